"""The `config.json` of Llama's relatives and of T5 with a table of biases per layer, read and written."""

import json
from pathlib import Path

import pytest

from gqa import models
from gqa.checkpoints import hf_config
from gqa.errors import InputError

CHOICES = dict(
    tied_logits=False, dropout_rate=0.0, dtype="float32", param_dtype="float32", scan_layers=True, remat="none"
)
SIZES = dict(
    vocab_size=10, hidden_size=256, num_attention_heads=32, num_hidden_layers=3, intermediate_size=8, hidden_act="silu"
)


LLAMA_3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def read(model_type: str, **raw):
    """Our configuration of a config.json of `SIZES` and `raw`."""
    return hf_config.read(SIZES | {"model_type": model_type} | raw, Path("config.json"), CHOICES)


def written(config, choices=CHOICES) -> tuple[dict, models.ModelConfig]:
    """The config.json of a configuration, and what is read from it."""
    raw = json.loads(json.dumps(hf_config.write(config, "float32", None)))
    return raw, hf_config.read(raw, Path("config.json"), choices)


@pytest.mark.parametrize(
    ("model_type", "window", "qkv_bias", "qk_norm"),
    [
        ("llama", None, False, False),
        ("mistral", 4096, False, False),
        ("qwen2", None, True, False),
        ("qwen3", None, False, True),
    ],
)
def test_a_model_type_says_what_a_model_has(model_type, window, qkv_bias, qk_norm):
    config = read(model_type)
    assert (config.sliding_window, config.qkv_bias, config.qk_norm) == (window, qkv_bias, qk_norm)
    assert written(config)[0]["model_type"] == model_type


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("window", "types", "expected"),
    [
        (None, ["full_attention"] * 3, None),
        (7, ["full_attention"] * 3, None),
        (7, ["sliding_attention"] * 3, 7),
        (7, ["full_attention", "sliding_attention", "sliding_attention"], "3 layer_types of full_attention, sliding"),
        (7, ["sliding_attention"] * 2, "2 layer_types of sliding_attention are not supported; expected 3 times"),
        (None, ["sliding_attention"] * 3, "sliding_window=None and 3 layer_types of sliding_attention"),
        (7, ["chunked_attention"] * 3, "layer_types of chunked_attention"),
    ],
)
def test_layer_types(model_type, window, types, expected):
    raw = dict(use_sliding_window=window is not None, sliding_window=window, layer_types=types)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read(model_type, **raw)
    else:
        assert read(model_type, **raw).sliding_window == expected


@pytest.mark.parametrize(
    ("model_type", "raw", "message"),
    [
        ("qwen2", dict(use_sliding_window=True, max_window_layers=1), "sliding_window=4096 and 3 layer_types of full_"),
        ("qwen2", dict(use_sliding_window=1), "use_sliding_window=1; expected true or false"),
        ("qwen3", dict(attention_bias=True), "attention_bias=true is not supported; expected false"),
        ("mistral", dict(sliding_window=-1), "sliding_window=-1; expected a positive integer"),
        (
            "mistral",
            dict(layer_types=["full_attention"] * 3),
            "sliding_window=4096 and 3 layer_types of full_attention",
        ),
        ("mistral", dict(rope_parameters={"rope_type": "yarn"}), "rope_type='yarn' is not supported"),
        ("qwen2", dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type='dynamic' is not supported"),
        ("qwen3", dict(rope_scaling={"rope_type": "longrope"}), "rope_type='longrope' is not supported"),
        ("llama", dict(is_causal=False), "config.json: is_causal=false is not supported; expected true$"),
        ("qwen3", dict(per_layer_config={"1": {"hidden_act": "relu"}}), "per_layer_config={.*} is not supported"),
        ("llama", dict(rope_theta=1e4, partial_rotary_factor=0.5), "rope_type='default' is not supported as given"),
        ("mistral", dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), r"by kind of layer \('full_atten"),
        (
            "llama",
            dict(rope_scaling=LLAMA_3 | dict(original_max_position_embeddings=64), original_max_position_embeddings=16),
            "original_max_position_embeddings is 16, and 64 in the RoPE parameters; expected one of them",
        ),
        ("qwen2_moe", {}, "model_type='qwen2_moe' is not supported; expected one of t5, mt5, llama, mistral, qwen2"),
    ],
)
def test_configs_that_are_refused(model_type, raw, message):
    with pytest.raises(InputError, match=message):
        read(model_type, **raw)


@pytest.mark.parametrize("window", [{}, dict(sliding_window=7, use_sliding_window=True, max_window_layers=0)])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [None, 4, [4, 8, 4]])
def test_what_is_written_is_read(model_type, kv_heads, window):
    config = read(model_type, num_key_value_heads=kv_heads, **window)
    raw, reread = written(config)
    assert raw["model_type"] == model_type and raw["architectures"][0].lower() == f"{model_type}forcausallm"
    assert reread == config


def test_mistral_without_a_window_is_written_as_llama():
    config = read("mistral", sliding_window=None)
    raw, reread = written(config)
    assert raw["model_type"] == "llama" and reread == config
    odd = models.replace(config, num_heads=6, decoder_self_kv_heads=6, head_dim=10)  # transformers' Llama refuses it
    raw, reread = written(odd)
    assert raw["model_type"] == "mistral" and reread == odd


def test_rope_scaling_wins_over_rope_parameters():
    both = dict(
        rope_parameters=dict(rope_type="default", rope_theta=10.0),
        rope_scaling=LLAMA_3 | dict(original_max_position_embeddings=64),
    )
    config = read("llama", **both)
    assert (config.rope_scaling.factor, config.rope_theta) == (8.0, 10000.0)
    assert read("llama", **both | {"rope_scaling": None}).rope_theta == 10.0


def test_the_original_positions_may_stand_beside_the_rope_parameters():
    config = read("llama", rope_parameters=LLAMA_3, original_max_position_embeddings=64)
    assert config.rope_scaling.original_max_position == 64


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (dict(dense_act_fn="relu"), 'config.json: dense_act_fn="relu" is not supported; expected "gelu_new"$'),
        (dict(is_gated_act=False), "is_gated_act=false is not supported; expected true"),
        (dict(decoder_start_token_id=7), "decoder_start_token_id=7 is not supported; expected 0"),
        (dict(is_causal=False), "is_causal=false is not supported; expected true"),
    ],
)
def test_t5_configs_that_are_refused(raw, message):
    mini, choices = models.size("t5_1_1_mini"), CHOICES | {"tied_logits": False}
    written_raw = hf_config.write(mini, "float32", None)
    hf_config.read(written_raw, Path("config.json"), choices)
    with pytest.raises(InputError, match=message):
        hf_config.read(written_raw | raw, Path("config.json"), choices)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "llama"])
def test_ties_are_true_or_false(model_type):
    raw = {"model_type": model_type, "tie_word_embeddings": True}
    assert hf_config.ties_logits(raw, Path("config.json")) == (model_type != "mt5")
    with pytest.raises(InputError, match="tie_word_embeddings='false'; expected true or false"):
        hf_config.ties_logits(raw | {"tie_word_embeddings": "false"}, Path("config.json"))


def test_a_table_of_relative_biases_per_layer():
    mini = models.size("t5_1_1_mini")
    choices = CHOICES | {"tied_logits": mini.tied_logits}
    raw, reread = written(mini, choices)
    assert "relative_bias_per_layer" not in raw and not reread.relative_bias_per_layer
    per_layer = models.replace(mini, relative_bias_per_layer=True)
    raw, reread = written(per_layer, choices)
    assert raw["relative_bias_per_layer"] is True and reread == per_layer
