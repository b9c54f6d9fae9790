"""Mistral, Qwen2 and Qwen3 against transformers: logits, gradients, cached decoding, keys left out of config.json."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from gqa.checkpoints import hf_config

CHOICES = dict(
    tied_logits=False, dropout_rate=0.0, dtype="float32", param_dtype="float32", scan_layers=True, remat="none"
)
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
# Sequences have 7 tokens or more: a window of 3 cuts all of them.
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=3, max_window_layers=0)
VARIANTS = {
    "mistral": (MistralConfig, dict(sliding_window=3)),
    "mistral, scaled RoPE": (
        MistralConfig,
        dict(sliding_window=5, head_dim=6, rope_parameters=LLAMA3 | {"rope_theta": 100.0}),
    ),
    "qwen2": (Qwen2Config, dict(num_attention_heads=4, hidden_size=24, num_key_value_heads=2)),
    "qwen2, window": (Qwen2Config, dict(num_attention_heads=4, hidden_size=16, num_key_value_heads=1, **QWEN_WINDOW)),
    "qwen3": (Qwen3Config, dict(head_dim=10)),  # hidden_size is 2, 4 or 6 a head
    "qwen3, window": (Qwen3Config, dict(head_dim=8, **QWEN_WINDOW)),
}


@pytest.fixture
def make_case(decoder_case):
    """A function (name in `VARIANTS`, seed) -> a case."""

    def make(variant: str, seed: int):
        config_class, settings = VARIANTS[variant]
        return decoder_case(config_class, seed, **settings)

    return make


@pytest.mark.parametrize("seed", [2, 3])  # tied logits; a kernel of their own
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(variant, seed, make_case, check_decoder_gradients):
    check_decoder_gradients(make_case(variant, seed), scan_layers=seed % 2 == 0)


@pytest.mark.parametrize(
    "variant",
    # With a window, or a scaled RoPE too; the plain ones with the long counts.
    [variant if "," in variant else pytest.param(variant, marks=pytest.mark.full) for variant in VARIANTS],
)
def test_cached_decoding(variant, make_case, check_decoder_cache):
    check_decoder_cache(make_case(variant, 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_transformers_loads_what_is_saved(variant, make_case, check_decoder_saved):
    case = make_case(variant, 2)
    config, expected = check_decoder_saved(case).config, case.reference.config
    assert config.model_type == expected.model_type
    for name in ("sliding_window", "layer_types", "use_sliding_window", "tie_word_embeddings", "num_key_value_heads"):
        assert getattr(config, name, None) == getattr(expected, name, None), name


SIZES = dict(
    vocab_size=10, hidden_size=256, num_attention_heads=32, num_hidden_layers=3, intermediate_size=8, hidden_act="silu"
)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"sliding_window": None},
        {"sliding_window": 7},
        {"sliding_window": 7, "use_sliding_window": True},
        {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window": 7, "max_window_layers": 0},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_keys_that_are_left_out_mean_what_transformers_means(config_class, raw):
    config_json = SIZES | raw | {"model_type": config_class.model_type}
    found, expected = hf_config.read(config_json, Path("config.json"), CHOICES), config_class(**SIZES, **raw)
    assert found.decoder_self_kv_heads == expected.num_key_value_heads
    assert found.head_dim == getattr(expected, "head_dim", 256 // 32)
    assert found.max_position == expected.max_position_embeddings
    assert found.norm_epsilon == expected.rms_norm_eps
    assert found.rope_theta == expected.rope_parameters["rope_theta"]
    assert found.tied_logits == expected.tie_word_embeddings
    if config_class is LlamaConfig:
        assert found.sliding_window is None  # transformers keeps the key and does not read it
    elif config_class is MistralConfig:
        assert found.sliding_window == expected.sliding_window
    else:
        kinds = set(expected.layer_types)
        assert found.sliding_window == (expected.sliding_window if kinds == {"sliding_attention"} else None)
