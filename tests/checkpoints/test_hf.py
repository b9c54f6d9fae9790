"""Hugging Face directories: what is saved is loaded again, and what cannot be loaded is named. Parity: tests/parity."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gqa import checkpoints, models
from gqa.checkpoints import hf, hf_config, writer
from gqa.checkpoints.tensor import open_safetensors
from gqa.errors import InputError
from gqa.nn.position import RopeScaling

ROOT = Path(__file__).parents[2]
RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
SMALL = dict(vocab_size=20, d_model=6, num_heads=4, head_dim=4, d_ff=10)
T5 = models.replace(models.size("t5_1_1_mini"), **SMALL, num_decoder_layers=3)
LLAMA = models.replace(models.size("llama_mini"), **SMALL, num_layers=3)
CONFIGS = {
    "multi-head T5": T5,
    "tied T5": models.replace(T5, tied_logits=True, activation="silu", relative_buckets=8, relative_max_distance=40),
    "grouped T5": models.replace(T5, encoder_self_kv_heads=2, decoder_self_kv_heads=1, cross_kv_heads=(4, 2, 2)),
    "grouped Llama": models.replace(LLAMA, decoder_self_kv_heads=2),
    "Llama of several": models.replace(LLAMA, decoder_self_kv_heads=(1, 4, 4), tied_logits=True),
    "Llama 3": models.replace(LLAMA, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), max_position=99),
}


def model_of(config) -> models.Model:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), models.abstract(config))


@pytest.fixture
def saved(tmp_path):
    """A directory with grouped T5, the tensors and the configuration in it, and functions to replace them."""
    return Saved(tmp_path / "model", CONFIGS["grouped T5"])


class Saved:
    def __init__(self, directory, config):
        self.directory = directory
        hf.save(model_of(config), directory, dtype="float32")
        self.tensors = load_file(directory / "model.safetensors")
        self.raw = json.loads((directory / "config.json").read_text())

    def write(self):
        save_file(self.tensors, self.directory / "model.safetensors")
        (self.directory / "config.json").write_text(json.dumps(self.raw))

    def write_index(self, weight_map, **files):
        (self.directory / "model.safetensors").unlink()
        for name, tensors in files.items():
            save_file(tensors, self.directory / f"{name}.safetensors")
        (self.directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def refused(self) -> str:
        with pytest.raises(InputError) as error:
            checkpoints.load(self.directory, **RUN)
        message = str(error.value)
        assert "\n" not in message
        return message


def assert_equal_models(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, expected_leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_again(name, tmp_path):
    model = model_of(CONFIGS[name])
    hf.save(model, tmp_path / "model", dtype="float32")
    assert checkpoints.read_config(tmp_path / "model", **RUN) == CONFIGS[name]
    assert_equal_models(checkpoints.load(tmp_path / "model", **RUN), model)
    hf.save(model.unstacked(), tmp_path / "unstacked", dtype="float32")
    assert_equal_models(checkpoints.load(tmp_path / "unstacked", **RUN), model)


def test_others_may_read_the_weights_where_they_may_read_the_folder(tmp_path):
    hf.save(model_of(next(iter(CONFIGS.values()))), tmp_path / "model", dtype="float32")
    folder, file = ((tmp_path / "model" / name).stat().st_mode for name in (".", "model.safetensors"))
    assert file & 0o444 == folder & 0o444


def test_names_shapes_and_layout_of_grouped_t5(saved):
    model = model_of(CONFIGS["grouped T5"])
    assert saved.raw["num_key_value_heads"] == {"encoder_self": 2, "decoder_self": 1, "cross": [4, 2, 2]}
    assert {name: list(tensor.shape) for name, tensor in saved.tensors.items() if "decoder.block.1." in name} == {
        "decoder.block.1.layer.0.SelfAttention.q.weight": [16, 6],
        "decoder.block.1.layer.0.SelfAttention.k.weight": [4, 6],
        "decoder.block.1.layer.0.SelfAttention.v.weight": [4, 6],
        "decoder.block.1.layer.0.SelfAttention.o.weight": [6, 16],
        "decoder.block.1.layer.0.layer_norm.weight": [6],
        "decoder.block.1.layer.1.EncDecAttention.q.weight": [16, 6],
        "decoder.block.1.layer.1.EncDecAttention.k.weight": [8, 6],
        "decoder.block.1.layer.1.EncDecAttention.v.weight": [8, 6],
        "decoder.block.1.layer.1.EncDecAttention.o.weight": [6, 16],
        "decoder.block.1.layer.1.layer_norm.weight": [6],
        "decoder.block.1.layer.2.DenseReluDense.wi_0.weight": [10, 6],
        "decoder.block.1.layer.2.DenseReluDense.wi_1.weight": [10, 6],
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": [6, 10],
        "decoder.block.1.layer.2.layer_norm.weight": [6],
    }
    # Layer 1 is the first of the second stack; row K*d of their tensor is head K, width d of ours.
    key = saved.tensors["decoder.block.1.layer.1.EncDecAttention.k.weight"]
    np.testing.assert_array_equal(key[4 * 1 + 3], model.decoder[1].cross_attention.key[...][0, :, 1, 3])
    out = saved.tensors["decoder.block.1.layer.1.EncDecAttention.o.weight"]
    np.testing.assert_array_equal(out[:, 4 * 2 + 3], model.decoder[1].cross_attention.out[...][0, 2, 3])


def test_multi_head_t5_has_no_key_that_stock_transformers_lacks(tmp_path):
    assert "num_key_value_heads" not in Saved(tmp_path / "model", T5).raw


def test_bfloat16(tmp_path):
    model = model_of(T5)
    hf.save(model, tmp_path / "model", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    loaded = checkpoints.load(tmp_path / "model", **RUN | {"param_dtype": "bfloat16"})
    for leaf, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(rounded), strict=True):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, expected)
    assert checkpoints.load(tmp_path / "model", **RUN).embedding[...].dtype == jnp.float32


@pytest.mark.parametrize("name", ["grouped T5", "grouped Llama"])
def test_several_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    model = model_of(CONFIGS[name])
    hf.save(model, tmp_path / "model", dtype="float32")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(sum(t.nbytes for t in load_file(tmp_path / "model" / file).values()) <= 3000 for file in files)
    assert_equal_models(checkpoints.load(tmp_path / "model", **RUN), model)


# Devices are a choice of the process: this runs in one with four. Its last line is for the test.
SHARDED = """
import json, sys
import jax, numpy as np
from gqa import checkpoints
from gqa.sharding import MeshConfig, make_mesh

directory, run = sys.argv[1], json.loads(sys.argv[2])
whole = checkpoints.load(directory, **run)
sharded = checkpoints.load(directory, mesh=make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), **run)
for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
    np.testing.assert_array_equal(one, other)
attentions = [sharded.encoder[0].self_attention, sharded.decoder[0].self_attention]
kernels = [kernel for attention in attentions for kernel in (attention.query, attention.key)]
print(json.dumps([kernel[...].addressable_shards[0].data.shape for kernel in kernels]))
"""


def test_parameters_are_born_sharded(saved):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(saved.directory), json.dumps(RUN)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Width 6 over fsdp=2, heads over tensor=2; the decoder's single key/value head is replicated.
    assert json.loads(result.stdout.splitlines()[-1]) == [[2, 3, 2, 4], [2, 3, 1, 4], [1, 3, 2, 4], [1, 3, 1, 4]]
    assert "kv_heads=1 is not divisible by mesh axes tensor=2: replicated" in result.stderr


def test_equal_copies_of_the_embedding_are_accepted(saved):
    shared = saved.tensors["shared.weight"]
    saved.tensors |= {"encoder.embed_tokens.weight": shared, "decoder.embed_tokens.weight": shared.copy()}
    saved.write()
    assert_equal_models(checkpoints.load(saved.directory, **RUN), model_of(CONFIGS["grouped T5"]))
    del saved.tensors["shared.weight"]  # any of the names will do
    saved.write()
    assert_equal_models(checkpoints.load(saved.directory, **RUN), model_of(CONFIGS["grouped T5"]))
    saved.tensors["decoder.embed_tokens.weight"] = shared + 1
    saved.write()
    assert "encoder.embed_tokens.weight and decoder.embed_tokens.weight differ" in saved.refused()


def test_an_equal_logits_kernel_of_a_tied_model_is_a_copy(tmp_path):
    saved = Saved(tmp_path / "model", CONFIGS["tied T5"])
    saved.tensors["lm_head.weight"] = saved.tensors["shared.weight"]
    saved.write()
    assert_equal_models(checkpoints.load(saved.directory, **RUN), model_of(CONFIGS["tied T5"]))


def test_logits_of_scaled_outputs_get_the_scale_in_their_kernel(tmp_path):
    saved = Saved(tmp_path / "model", CONFIGS["tied T5"])
    saved.tensors["lm_head.weight"] = saved.tensors["shared.weight"] * 2
    saved.write()
    model = checkpoints.load(saved.directory, **RUN)
    np.testing.assert_allclose(model.logits[...], model.embedding[...].T * 2 / np.sqrt(6), rtol=1e-6)


def test_old_configs(tmp_path):
    saved = Saved(tmp_path / "t5", T5)
    for name in ("scale_decoder_outputs", "num_decoder_layers", "relative_attention_max_distance", "dense_act_fn"):
        del saved.raw[name]
    saved.raw["num_layers"] = 2
    saved.tensors = {name: tensor for name, tensor in saved.tensors.items() if "block.2." not in name}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    saved.tensors[unused] = np.zeros((32, 4), np.float32)
    saved.write()
    assert checkpoints.load(saved.directory, **RUN).config == models.replace(T5, num_decoder_layers=2)

    saved = Saved(tmp_path / "llama", models.replace(CONFIGS["Llama 3"], head_dim=2, d_model=8))
    for name in ("rope_parameters", "head_dim", "num_key_value_heads"):
        del saved.raw[name]
    saved.raw["rope_scaling"]["type"] = saved.raw["rope_scaling"].pop("rope_type")
    saved.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(1, np.float32)
    saved.write()
    assert checkpoints.load(saved.directory, **RUN).config == models.replace(CONFIGS["Llama 3"], head_dim=2, d_model=8)


def test_token_ids_and_extra_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    ids = {"bos_token_id": 128000, "eos_token_id": 128001}
    files = [tmp_path / "tokenizer.json"]
    hf.save(model_of(LLAMA), tmp_path / "model", dtype="float32", token_ids=ids, extra_files=files)
    assert hf_config.token_ids(tmp_path / "model") == ids
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer.json"]


def test_save_refuses_and_leaves_nothing(tmp_path, saved):
    model = model_of(LLAMA)
    with pytest.raises(InputError, match="exists already; name a new directory"):
        hf.save(model, saved.directory, dtype="float32")
    with pytest.raises(InputError, match=r"tokenizer\.model is not a file"):
        hf.save(model, tmp_path / "new", dtype="float32", extra_files=[tmp_path / "tokenizer.model"])
    with pytest.raises(InputError, match="dtype='int8' cannot be saved; expected one of float32, bfloat16"):
        hf.save(model, tmp_path / "new", dtype="int8")
    both = models.replace(LLAMA, qkv_bias=True, qk_norm=True)
    with pytest.raises(InputError, match="qkv_bias and qk_norm are true: no model_type of transformers has both"):
        hf.save(model_of(both), tmp_path / "new", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_shard", fail)
    with pytest.raises(InputError, match="model cannot be written: No space left on device; nothing was left there"):
        hf.save(model_of(LLAMA), tmp_path / "model", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_are_preferred_to_pytorch_files(saved):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (saved.directory / name).write_bytes(b"not to be read")
    assert_equal_models(checkpoints.load(saved.directory, **RUN), model_of(CONFIGS["grouped T5"]))
    (saved.directory / "model.safetensors").unlink()
    assert "pytorch_model.bin is no file of torch.save" in saved.refused()


def test_missing_files(tmp_path, saved):
    with pytest.raises(InputError, match="nowhere is not a directory; expected a checkpoint's"):
        checkpoints.load(tmp_path / "nowhere", **RUN)
    (saved.directory / "config.json").rename(saved.directory / "config.jsonx")
    assert saved.refused().endswith("config.json is missing")
    (saved.directory / "model.safetensors").unlink()
    assert "model is no checkpoint of a known format (Hugging Face" in saved.refused()
    assert saved.refused().endswith("found SHA256SUMS, config.jsonx")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "has 0 bytes; expected a safetensors file"),
        (4, "has 4 bytes; expected a safetensors file"),
        (100, "the file has 100; it is damaged or cut short"),
        (-1, "the file is cut short"),
    ],
)
def test_truncated_weights(saved, length, message):
    path = saved.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert saved.refused().startswith(f"{path} ") or saved.refused().startswith(f"{path}: ")
    assert message in saved.refused()


def write_header(path, header: str):
    """A safetensors file of 16 bytes of zeros behind `header`."""
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    return path


def test_headers_that_are_no_json_of_ours(tmp_path):
    number = '{"A": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 16]}}' % ("9" * 5000)
    for header in (number, "[" * 100_000, '{"A": '):
        with pytest.raises(InputError, match=r"x.safetensors has a damaged header: "):
            open_safetensors(write_header(tmp_path / "x.safetensors", header))


def test_two_tensors_in_the_same_place(tmp_path):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"A": entry, "B": entry | {"shape": [2, 2]}})
    with pytest.raises(InputError, match="B begins at byte 0; expected 16, where the tensor before ends"):
        open_safetensors(write_header(tmp_path / "x.safetensors", header))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}  # lies nowhere, as do several
    path = write_header(tmp_path / "x.safetensors", json.dumps({"A": entry, "B": empty, "C": empty}))
    assert {name: tensor.shape for name, tensor in open_safetensors(path).items()} == {"A": (4,), "B": (0,), "C": (0,)}


def test_missing_unknown_and_misshapen_tensors(saved):
    norm = saved.tensors.pop("encoder.final_layer_norm.weight")
    saved.write()
    assert saved.refused().endswith("lacks 1 tensor(s) for its sizes: encoder.final_layer_norm.weight")
    saved.tensors |= {"encoder.final_layer_norm.weight": norm[:-1], "encoder.extra.weight": norm}
    saved.write()
    assert saved.refused().endswith("has unknown 1 tensor(s) for its sizes: encoder.extra.weight")
    del saved.tensors["encoder.extra.weight"]
    saved.write()
    message = saved.refused()
    assert message.startswith("encoder.final_layer_norm.weight in ") and "has shape [5]; expected [6]" in message
    saved.tensors["encoder.final_layer_norm.weight"] = np.ones(6, np.int32)
    saved.write()
    assert "encoder.final_layer_norm.weight has type I32; expected one of F64, F32, F16, BF16" in saved.refused()
    saved.tensors["encoder.final_layer_norm.weight"] = norm
    del saved.tensors["shared.weight"]
    saved.write()
    assert "lacks the tensor shared.weight" in saved.refused()


def test_a_type_that_is_no_name(saved):
    path = saved.directory / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'["F"]'))
    assert "has type ['F']; expected one of F64, F32, F16, BF16" in saved.refused()


def test_indexes(saved):
    name, *others = sorted(saved.tensors)
    rest = {other: saved.tensors[other] for other in others}
    saved.write_index(dict.fromkeys(others, "b.safetensors") | {name: "a.safetensors"}, b=rest)
    assert saved.refused().endswith("names a.safetensors, which is missing")
    (saved.directory / "model.safetensors").touch()
    saved.write_index(dict.fromkeys(others, "b.safetensors") | {name: "../model/b.safetensors"})
    assert (
        "names the file '../model/b.safetensors'; expected the name of a file of weights without a folder"
        in saved.refused()
    )
    (saved.directory / "model.safetensors").touch()
    saved.write_index(dict.fromkeys(saved.tensors, "b.safetensors"))
    assert f"does not describe its files: {name} not where it says" in saved.refused()
    (saved.directory / "model.safetensors").touch()
    twice = dict.fromkeys(others, "b.safetensors") | {name: "a.safetensors"}
    saved.write_index(twice, a={name: saved.tensors[name], others[0]: saved.tensors[others[0]]})
    assert f"{others[0]} is set twice: in a.safetensors and b.safetensors" in saved.refused()
    (saved.directory / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert saved.refused().endswith("has no weight_map of tensor names to file names")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert' is not supported; expected one of t5, mt5, llama"),
        ({"model_type": ["t5"]}, "model_type=['t5'] is not supported; expected one of t5, mt5, llama"),
        ({"num_layers": 10**12}, "num_layers=1000000000000; expected at most 1,000"),
        ({"num_decoder_layers": 1001}, "num_decoder_layers=1001; expected at most 1,000"),
        ({"num_heads": 10**12}, "num_heads=1000000000000; expected at most 100,000"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported; expected one of gated-gelu"),
        ({"feed_forward_proj": None}, "feed_forward_proj='relu' is not supported"),
        ({"num_heads": 0}, "num_heads=0; expected a positive integer"),
        ({"d_model": "6"}, "d_model='6'; expected a positive integer"),
        ({"vocab_size": None}, "has no vocab_size; expected a positive integer"),
        ({"num_key_value_heads": {"cross": 3}}, "cross_kv_heads=3 does not divide num_heads=4; nearest: 2, 4"),
        ({"num_key_value_heads": {"cross": [2, 2]}}, "cross_kv_heads names 2 layers, the model has 3"),
        ({"num_key_value_heads": {"self": 2}}, "num_key_value_heads names 'self'; expected encoder_self, decoder_self"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2; expected an object"),
    ],
)
def test_t5_configs_that_are_refused(saved, changes, message):
    saved.raw |= changes
    saved.write()
    assert message in saved.refused()


def test_another_start_of_decoding_is_found_in_either_file(saved):
    del saved.raw["decoder_start_token_id"]
    saved.write()
    generation = saved.directory / "generation_config.json"
    generation.write_text(json.dumps({"decoder_start_token_id": 0, "eos_token_id": [1, 5]}))
    checkpoints.load(saved.directory, **RUN)
    generation.write_text(json.dumps({"decoder_start_token_id": 7}))
    assert "generation_config.json: decoder_start_token_id=7 is not supported; expected 0" in saved.refused()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=true is not supported; expected false"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000; expected at most 1,000"),
        ({"model_type": "mistral", "num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000; expected at most"),
        ({"num_attention_heads": 10**12}, "num_attention_heads=1000000000000; expected at most 100,000"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected one of silu, relu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "has no factor; expected a positive number"),
        ({"num_key_value_heads": 3}, "decoder_self_kv_heads=3 does not divide num_heads=4; nearest: 2, 4"),
        ({"num_key_value_heads": 4}, "has shape [8, 6]; expected [16, 6]"),
    ],
)
def test_llama_configs_that_are_refused(tmp_path, changes, message):
    saved = Saved(tmp_path / "model", CONFIGS["grouped Llama"])
    saved.raw |= changes
    saved.write()
    assert message in saved.refused()


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_configs_that_are_not_json_objects(saved, text):
    (saved.directory / "config.json").write_text(text)
    assert "config.json" in saved.refused()
