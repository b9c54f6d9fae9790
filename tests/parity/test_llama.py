"""Llama against transformers on random architectures: logits, gradients, cached decoding and rotary frequencies."""

import random

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gqa import checkpoints
from gqa.nn.position import RopeScaling, rotary_angles, rotary_frequencies

RUN = dict(dtype="float32", param_dtype="float32", remat="none", dropout_rate=0.0)
# Contexts so short that the test's positions feel each branch of the scaling.
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)


@pytest.fixture
def make_case(decoder_case):
    """A function seed -> a case; odd seeds scale the rotary frequencies."""

    def make(seed: int):
        rng = random.Random(seed)
        rope = {
            "rope_theta": rng.choice([100.0, 10000.0]),
            **(LLAMA3 if seed % 2 else {"rope_type": "default"}),
        }
        return decoder_case(LlamaConfig, seed, head_dim=rng.choice([4, 6, 8]), rope_parameters=rope)

    return make


@pytest.mark.parametrize("seed", range(12))
def test_logits_and_gradients(seed, make_case, check_decoder_gradients):
    check_decoder_gradients(make_case(seed), scan_layers=seed % 2 == 0)


@pytest.mark.parametrize("seed", [*(pytest.param(seed, marks=pytest.mark.full) for seed in (0, 1)), 4, 7])
def test_cached_decoding(seed, make_case, check_decoder_cache):
    check_decoder_cache(make_case(seed))


def test_scanned_layers_equal_unrolled_ones(make_case, assert_close):
    case = make_case(3)
    scanned, unrolled = (checkpoints.load(case.directory, scan_layers=scan, **RUN) for scan in (True, False))
    forward = jax.jit(lambda model: model(case.tokens))
    assert_close(forward(scanned), forward(unrolled), 1e-5, "logits")


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
def test_stock_transformers_loads_what_is_saved(seed, make_case, check_decoder_saved):
    check_decoder_saved(make_case(seed))
