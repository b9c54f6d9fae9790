"""T5X checkpoints, separate and scanned, against transformers: the same weights give the same logits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from gqa import checkpoints
from gqa.checkpoints import flax_msgpack

RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
SIZES = dict(vocab_size=50, d_model=12, d_kv=4, d_ff=20, num_heads=4, num_layers=3, num_decoder_layers=2)
INPUTS, TARGETS = (np.random.default_rng(seed).integers(2, 50, (2, length)) for seed, length in ((0, 40), (1, 30)))
STORED = {
    "gzip": {},
    "zstd": dict(compressor="zstd"),
    "not compressed": dict(compressor=None),
    "nested chunks": dict(separator="/"),
    "bfloat16": dict(dtype="bfloat16"),
    "inline": dict(inline=True),
    "inline bfloat16": dict(inline=True, dtype="bfloat16"),
    "old, with optimizer state": dict(old_specs=True),
    "heads apart": dict(head_dim=4),
}
forward = jax.jit(lambda model: model(jnp.asarray(INPUTS), jnp.asarray(TARGETS)))


def random_model(kind: str, seed: int, tied: bool):
    config_class, model_class = {
        "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
        "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration),
    }[kind]
    torch.manual_seed(seed)
    config = config_class(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=tied, scale_decoder_outputs=tied)
    model = model_class(config).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:  # large enough for a mix-up to show
                parameter.normal_()
    return model


def tensors_of(model, tied: bool) -> dict[str, np.ndarray]:
    left_out = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in left_out}


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(INPUTS), decoder_input_ids=torch.tensor(TARGETS)).logits.numpy()


@pytest.fixture
def check(tmp_path, write_t5x, assert_close):
    """A function (reference, tied, how it is stored) -> the model loaded, whose logits are the reference's."""

    def check(reference, tied: bool, tensors=None, **stored):
        if stored.get("dtype") == "bfloat16":
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter.copy_(parameter.bfloat16().float())
        write_t5x(tmp_path / "checkpoint_7", tensors or tensors_of(reference, tied), **stored)
        contents = checkpoints.read(tmp_path / "checkpoint_7", **RUN)
        expected = ml_dtypes.bfloat16 if stored.get("dtype") == "bfloat16" else np.float32
        assert {tensor.dtype for tensor, _ in contents.tensors.values()} == {np.dtype(expected)}
        model = checkpoints.load(tmp_path / "checkpoint_7", **RUN)
        assert_close(forward(model), logits_of(reference), 1e-4, "logits")
        return model

    return check


@pytest.mark.parametrize("stored", STORED)
def test_separate_layers(check, stored):
    assert not check(random_model("t5", 0, False), False, **STORED[stored]).config.relative_bias_per_layer


def test_tied_logits(check):
    assert check(random_model("t5", 1, True), True).config.tied_logits


@pytest.mark.parametrize(
    ("stored", "layer_chunk"),
    [("gzip", 100), ("gzip", 2), ("heads apart", 1), ("heads apart", 100), ("zstd", 2), ("inline bfloat16", 100)],
)
def test_scanned_layers_with_a_table_each(check, stored, layer_chunk):
    # UMT5 is T5.1.1 with a table in each layer.
    model = check(random_model("umt5", 2, False), False, scanned=True, layer_chunk=layer_chunk, **STORED[stored])
    assert model.config.relative_bias_per_layer


def test_separate_layers_with_a_table_each(check):
    assert check(random_model("umt5", 3, False), False).config.relative_bias_per_layer


def test_scanned_layers_with_equal_tables_are_a_stock_t5(check):
    reference = random_model("t5", 4, False)
    tensors = tensors_of(reference, False)
    bias = "{}.block.{}.layer.0.SelfAttention.relative_attention_bias.weight".format
    for side, layers in (("encoder", 3), ("decoder", 2)):
        tensors |= {bias(side, layer): tensors[bias(side, 0)] for layer in range(layers)}
    check(reference, False, tensors, scanned=True, head_dim=4)


def test_fewer_key_value_heads(check):
    reference = random_model("t5", 5, False)
    tensors = tensors_of(reference, False)
    kv_heads = {"encoder.block.1.layer.0": 2, "decoder.block.0.layer.0": 1, "decoder.block.1.layer.1": 2}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            *layer, _, kind, _ = ["", *name.split(".")]
            K = kv_heads.get(".".join(layer[1:]))
            if K and kind in "kv":
                first = parameter.reshape(K, 4 // K, 4, 12)[:, :1]  # of each group
                parameter.copy_(first.expand(K, 4 // K, 4, 12).reshape(16, 12))
                tensors[name] = first.reshape(K * 4, 12).clone().numpy()
    config = check(reference, False, tensors).config
    assert config.kv_heads("encoder_self") == (4, 2, 4)
    assert config.kv_heads("decoder_self") == (1, 4)
    assert config.kv_heads("cross") == (4, 2)


def test_arrays_that_flax_wrote_in_pieces(check, monkeypatch):
    monkeypatch.setattr("flax.serialization.MAX_CHUNK_SIZE", 100)
    opened = []
    open_array = flax_msgpack.open_array
    monkeypatch.setattr(
        "gqa.checkpoints.t5x.open_array",
        lambda path, name, leaf: opened.append(isinstance(leaf, dict)) or open_array(path, name, leaf),
    )
    check(random_model("t5", 0, False), False, inline=True)
    assert any(opened)
