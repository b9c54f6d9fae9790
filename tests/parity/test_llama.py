"""Llama against transformers on random architectures: logits, gradients, cached decoding and rotary frequencies."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gqa.checkpoints import hf
from gqa.models.heads import divisors
from gqa.nn.position import RopeScaling, rotary_angles, rotary_frequencies
from gqa.objectives.language_model import cross_entropy

RUN = dict(dtype="float32", param_dtype="float32", remat="none", dropout_rate=0.0)
# Contexts so short that the test's positions feel each branch of the scaling.
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)


class Case:
    """A random architecture, a stock model of it with random weights, and a batch with padding."""

    def __init__(self, seed: int, directory, jitter_norms):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        num_heads = rng.choice([2, 4, 6, 8])
        kv_heads = {0: num_heads, 1: 1}.get(seed) or rng.choice(divisors(num_heads))
        config = LlamaConfig(
            vocab_size=rng.randint(20, 60),
            hidden_size=num_heads * rng.choice([2, 4, 5]),
            head_dim=rng.choice([4, 6, 8]),
            intermediate_size=rng.choice([12, 20]),
            num_hidden_layers=rng.randint(1, 3),
            num_attention_heads=num_heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=rng.choice([1e-5, 1e-6]),
            tie_word_embeddings=seed % 3 == 2,
            rope_parameters={
                "rope_theta": rng.choice([100.0, 10000.0]),
                **(LLAMA3 if seed % 2 else {"rope_type": "default"}),
            },
            # Large enough for attention to be far from uniform.
            initializer_range=0.4,
        )
        config._attn_implementation = "eager"
        self.reference = LlamaForCausalLM(config).eval()
        jitter_norms(self.reference)
        self.directory = directory / "stock"
        self.reference.save_pretrained(self.directory)

        B, T = 3, rng.choice([3, 7, 13, 22])
        self.tokens = np.random.default_rng(seed).integers(2, config.vocab_size, (B, T))
        self.targets = np.random.default_rng(seed + 1).integers(2, config.vocab_size, (B, T))
        self.segments = (np.arange(T) < np.array([[T], [T - 2], [1]])).astype(np.int32)


@pytest.fixture
def make_case(tmp_path, jitter_norms):
    return lambda seed: Case(seed, tmp_path, jitter_norms)


@pytest.mark.parametrize("seed", range(12))
def test_logits_and_gradients(seed, make_case, assert_close, reference_loss):
    case = make_case(seed)
    model = hf.load(case.directory, scan_layers=seed % 2 == 0, **RUN)

    @jax.jit
    def loss_and_gradients(model):
        def loss(model):
            logits = model(jnp.asarray(case.tokens), decoder_segments_BT=case.segments)
            sums = cross_entropy(logits, case.targets, case.segments, 0.0)
            return sums.loss_sum / sums.weight_sum, logits

        return jax.value_and_grad(loss, has_aux=True)(model)

    (loss, logits), gradients = loss_and_gradients(model)
    expected_logits = case.reference(
        input_ids=torch.tensor(case.tokens), attention_mask=torch.tensor(case.segments)
    ).logits
    expected_loss = reference_loss(expected_logits, torch.tensor(case.targets), torch.tensor(case.segments))
    expected_loss.backward()

    real = case.segments == 1
    assert_close(np.asarray(logits)[real], expected_logits.detach().numpy()[real], 1e-4, "logits")
    assert_close(loss, expected_loss.item(), 1e-4, "loss")
    found = dict(hf.named_tensors(gradients))
    expected = {name: parameter.grad.numpy() for name, parameter in case.reference.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-4, name)


@pytest.mark.parametrize("seed", [0, 1, 4, 7])
def test_cached_decoding(seed, make_case, assert_close):
    case = make_case(seed)
    stacked = hf.load(case.directory, scan_layers=True, **RUN)
    B, T = case.tokens.shape
    full = jax.jit(lambda model: model(case.tokens))(stacked)
    assert_close(full, case.reference(input_ids=torch.tensor(case.tokens)).logits.detach(), 1e-4, "full forward")
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    for model, chunk in ((stacked, 1), (stacked, 3), (stacked.unstacked(), 1)):
        cache, logits = model.init_cache(B, T + 2), []
        for first in range(0, T, chunk):
            chunk_logits, cache = step(model, case.tokens[:, first : first + chunk], cache)
            logits.append(chunk_logits)
        assert int(cache.index) == T
        assert_close(np.concatenate(logits, axis=1), full, 1e-5, f"chunks of {chunk}")


def test_scanned_layers_equal_unrolled_ones(make_case, assert_close):
    case = make_case(3)
    scanned, unrolled = (hf.load(case.directory, scan_layers=scan, **RUN) for scan in (True, False))
    forward = jax.jit(lambda model: model(case.tokens))
    assert_close(forward(scanned), forward(unrolled), 1e-6, "logits")


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [None, (8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 8.0, 64)])
def test_rotary_angles(theta, scaling, assert_close):
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3", **dict(zip(names, scaling, strict=True))}
    config = LlamaConfig(head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    positions = np.array([[0, 1, 2, 17, 100, 1000]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    frequencies = rotary_frequencies(128, theta, None if scaling is None else RopeScaling(*scaling))
    found_cos, found_sin = rotary_angles(positions, frequencies)
    # transformers repeats the angles for both halves of a head. float32 rounds an angle of 1000 by 6e-5.
    assert_close(found_cos, cos[..., :64], 2e-4, "cos")
    assert_close(found_sin, sin[..., :64], 2e-4, "sin")


@pytest.mark.parametrize("seed", [1, 2])  # MQA with scaled RoPE; tied logits
def test_stock_transformers_loads_what_is_saved(seed, make_case, tmp_path, assert_close):
    case = make_case(seed)
    hf.save(hf.load(case.directory, scan_layers=True, **RUN), tmp_path / "saved", dtype="float32")
    reread = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tokens = torch.tensor(case.tokens)
    assert_close(reread(tokens).logits.detach(), case.reference(tokens).logits.detach(), 1e-6, "logits")
    assert reread.config.rope_parameters == case.reference.config.rope_parameters
