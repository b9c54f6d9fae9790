"""T5 against transformers on random architectures: logits, gradients and cached decoding."""

import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from gqa import checkpoints
from gqa.checkpoints import hf
from gqa.models import replace
from gqa.models.heads import divisors
from gqa.nn.position import relative_position_bucket
from gqa.objectives.language_model import cross_entropy

RUN = dict(dtype="float32", param_dtype="float32", remat="none", dropout_rate=0.0)
KEY_VALUE = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.\d\.(Self|EncDec)Attention\.[kv]\.weight")


class Case:
    """A random architecture, a stock model of it with random weights, and a batch with padding."""

    def __init__(self, seed: int, directory, jitter_vectors):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.num_heads = rng.choice([2, 3, 4, 6, 8])
        encoder_layers, decoder_layers = rng.randint(1, 3), rng.randint(1, 3)
        self.logits = ("untied", "tied", "tied, not scaled")[seed % 3]
        config = T5Config(
            vocab_size=rng.randint(20, 60),
            d_model=rng.choice([8, 12, 20]),
            d_kv=rng.choice([4, 8]),
            d_ff=rng.choice([12, 20]),
            num_heads=self.num_heads,
            num_layers=encoder_layers,
            num_decoder_layers=decoder_layers,
            relative_attention_num_buckets=rng.choice([4, 8, 32]),
            relative_attention_max_distance=rng.choice([17, 40, 128]),
            feed_forward_proj=rng.choice(["gated-gelu", "gated-silu"]),
            tie_word_embeddings=self.logits == "tied",
            decoder_start_token_id=0,
        )
        config._attn_implementation = "eager"
        # Seeds 0 and 1 are multi-head; of the others, some differ from layer to layer.
        sites = {"encoder_self": encoder_layers, "decoder_self": decoder_layers, "cross": decoder_layers}
        self.kv_heads = {
            site: [self.num_heads] * layers if seed < 2 else rng.choices(divisors(self.num_heads), k=layers)
            for site, layers in sites.items()
        }
        self.reference = T5ForConditionalGeneration(config).eval()
        if self.logits == "untied":
            weight = torch.randn_like(self.reference.shared.weight) * config.d_model**-0.5
            self.reference.lm_head.weight = torch.nn.Parameter(weight)
        jitter_vectors(self.reference)
        with torch.no_grad():
            for name, parameter in self.reference.named_parameters():
                if groups := self.groups(name):
                    parameter.copy_(
                        torch.repeat_interleave(self.first_of_groups(parameter, groups), groups, 0).flatten(0, 1)
                    )
        self.directory = directory / "stock"
        self.reference.save_pretrained(self.directory)
        if seed >= 2:
            self.make_compact()

        B, S, T = 3, rng.choice([5, 7, 12, 19]), rng.choice([3, 6, 11, 18])
        self.inputs = np.random.default_rng(seed).integers(2, config.vocab_size, (B, S))
        self.decoder_inputs = np.random.default_rng(seed + 1).integers(2, config.vocab_size, (B, T))
        self.targets = np.random.default_rng(seed + 2).integers(2, config.vocab_size, (B, T))
        self.input_segments = (np.arange(S) < np.array([[S], [S - 2], [1]])).astype(np.int32)
        self.segments = (np.arange(T) < np.array([[T], [1], [T - 1]])).astype(np.int32)

    def groups(self, name: str) -> int:
        """Query heads per key/value head, if the tensor `name` projects keys or values; else 0."""
        match = KEY_VALUE.fullmatch(name)
        if not match:
            return 0
        site = "cross" if match[3] == "EncDec" else f"{match[1]}_self"
        return self.num_heads // self.kv_heads[site][int(match[2])]

    def first_of_groups(self, weight, groups: int):
        """The first head of each group: `[K, d, D]`."""
        return weight.reshape(self.num_heads // groups, groups, -1, weight.shape[1])[:, 0]

    def make_compact(self) -> None:
        """Replaces the directory by one in which each group's equal key/value heads are written once."""
        raw = json.loads((self.directory / "config.json").read_text())
        raw["num_key_value_heads"] = self.kv_heads
        tensors = load_file(self.directory / "model.safetensors")
        for name, tensor in tensors.items():
            if groups := self.groups(name):
                tensors[name] = np.ascontiguousarray(self.first_of_groups(tensor, groups).reshape(-1, tensor.shape[1]))
        self.directory = self.directory.with_name("compact")
        self.directory.mkdir()
        (self.directory / "config.json").write_text(json.dumps(raw))
        save_file(tensors, self.directory / "model.safetensors")


@pytest.fixture
def make_case(tmp_path, jitter_vectors):
    return lambda seed: Case(seed, tmp_path, jitter_vectors)


@pytest.mark.parametrize("seed", range(10))
def test_logits_and_gradients(seed, make_case, assert_close, reference_loss):
    case = make_case(seed)
    model = checkpoints.load(case.directory, scan_layers=seed % 2 == 0, **RUN)
    assert model.config.tied_logits == (case.logits == "tied")

    @jax.jit
    def loss_and_gradients(model):
        def loss(model):
            segments = dict(inputs_segments_BS=case.input_segments, decoder_segments_BT=case.segments)
            logits = model(jnp.asarray(case.inputs), jnp.asarray(case.decoder_inputs), **segments)
            sums = cross_entropy(logits, case.targets, case.segments, 0.0)
            return sums.loss_sum / sums.weight_sum, logits

        return jax.value_and_grad(loss, has_aux=True)(model)

    (loss, logits), gradients = loss_and_gradients(model)
    expected_logits = case.reference(
        input_ids=torch.tensor(case.inputs),
        attention_mask=torch.tensor(case.input_segments),
        decoder_input_ids=torch.tensor(case.decoder_inputs),
        decoder_attention_mask=torch.tensor(case.segments),
    ).logits
    expected_loss = reference_loss(expected_logits, torch.tensor(case.targets), torch.tensor(case.segments))
    expected_loss.backward()

    real = case.segments == 1
    assert_close(np.asarray(logits)[real], expected_logits.detach().numpy()[real], 1e-4, "logits")
    assert_close(loss, expected_loss.item(), 1e-4, "loss")
    found = dict(hf.named_tensors(gradients))
    if case.logits == "tied, not scaled":  # ours has two parameters for it
        found["shared.weight"] = found["shared.weight"] + found.pop("lm_head.weight")
    expected = {name: parameter.grad.numpy() for name, parameter in case.reference.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if groups := case.groups(name):
            gradient = gradient.reshape(-1, groups, gradient.shape[0] // case.num_heads, gradient.shape[1])
            gradient = gradient.sum(1).reshape(found[name].shape)
        assert_close(found[name], gradient, 1e-4, name)


@pytest.mark.parametrize("seed", [*(pytest.param(seed, marks=pytest.mark.full) for seed in (0, 2)), 4, 7])
def test_cached_decoding(seed, make_case, assert_close):
    case = make_case(seed)
    stacked = checkpoints.load(case.directory, scan_layers=True, **RUN)
    T = case.decoder_inputs.shape[1]
    expected = case.reference(
        input_ids=torch.tensor(case.inputs),
        attention_mask=torch.tensor(case.input_segments),
        decoder_input_ids=torch.tensor(case.decoder_inputs),
    ).logits.detach()
    full = jax.jit(lambda model: model(case.inputs, case.decoder_inputs, inputs_segments_BS=case.input_segments))(
        stacked
    )
    assert_close(full, expected, 1e-4, "full forward")
    start = jax.jit(lambda model: model.init_cache(case.inputs, case.input_segments, T + 2))
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    for model, chunk in ((stacked, 1), (stacked, 3), (stacked.unstacked(), 1)):
        cache, logits = start(model), []
        for first in range(0, T, chunk):
            chunk_logits, cache = step(model, case.decoder_inputs[:, first : first + chunk], cache)
            logits.append(chunk_logits)
        assert int(cache.index) == T
        assert_close(np.concatenate(logits, axis=1), full, 1e-5, f"chunks of {chunk}")


def test_scanned_layers_equal_unrolled_ones(make_case, assert_close):
    case = make_case(5)
    scanned, unrolled = (checkpoints.load(case.directory, scan_layers=scan, **RUN) for scan in (True, False))
    assert replace(scanned.config, scan_layers=False) == unrolled.config
    forward = jax.jit(lambda model: model(case.inputs, case.decoder_inputs))
    assert_close(forward(scanned), forward(unrolled), 1e-5, "logits")


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 17), (64, 300)])
def test_relative_position_buckets(bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-400, 401)
    sizes = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    expected = T5Attention._relative_position_bucket(torch.tensor(distance), **sizes)
    np.testing.assert_array_equal(relative_position_bucket(jnp.asarray(distance), **sizes), expected)


@pytest.mark.parametrize("logits", ["untied", "tied"])
def test_stock_transformers_loads_what_is_saved(logits, make_case, tmp_path, assert_close):
    case = make_case(["untied", "tied"].index(logits))
    model = checkpoints.load(case.directory, scan_layers=True, **RUN)
    hf.save(model, tmp_path / "saved", dtype="float32")
    reread = T5ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    tokens = dict(input_ids=torch.tensor(case.inputs), decoder_input_ids=torch.tensor(case.decoder_inputs))
    assert_close(reread(**tokens).logits.detach(), case.reference(**tokens).logits.detach(), 1e-5, "logits")
    # Greedy decoding needs the start, end and padding tokens of config.json.
    generated = [m.generate(tokens["input_ids"], max_new_tokens=5, do_sample=False) for m in (reread, case.reference)]
    assert generated[0].tolist() == generated[1].tolist()
