"""The `config.json` of Hugging Face checkpoints: to our configurations and back."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gqa.errors import InputError
from gqa.models import ModelConfig, family_of
from gqa.models.heads import MAX_HEADS, MAX_LAYERS, KVHeads
from gqa.models.llama import LlamaConfig
from gqa.models.t5 import SITES, T5Config
from gqa.nn.position import RopeScaling


class _Decoder(NamedTuple):
    """What a model_type of Llama's family means; numbers are transformers' defaults for keys that are left out."""

    architecture: str  # transformers' class
    max_position: int = 2048
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    sliding_window: int | None = None  # None: never a window, whatever the keys say
    window_by_layer: bool = False  # use_sliding_window, max_window_layers and layer_types say which layers have it
    qkv_bias: bool = False
    qk_norm: bool = False
    bias_keys: tuple[str, ...] = ()  # keys that add biases which our models do not have
    token_ids: tuple[tuple[str, int], ...] = (("bos_token_id", 1), ("eos_token_id", 2))


_QWEN = dict(max_position=32768, num_kv_heads=32, sliding_window=4096, window_by_layer=True, token_ids=())
DECODERS = {
    "llama": _Decoder("LlamaForCausalLM", bias_keys=("attention_bias", "mlp_bias")),
    "mistral": _Decoder("MistralForCausalLM", max_position=131072, num_kv_heads=8, sliding_window=4096),
    "qwen2": _Decoder("Qwen2ForCausalLM", qkv_bias=True, **_QWEN),
    "qwen3": _Decoder("Qwen3ForCausalLM", qk_norm=True, head_dim=128, bias_keys=("attention_bias",), **_QWEN),
}
# Their model_type -> our family. mT5 is T5.1.1 with another vocabulary.
MODEL_TYPES = {"t5": "t5", "mt5": "t5"} | dict.fromkeys(DECODERS, "llama")
# Their feed_forward_proj -> our activation; transformers means the tanh approximation by T5's gated-gelu.
T5_ACTIVATIONS = {"gated-gelu": "gelu_new", "gated-silu": "silu", "gated-relu": "relu"}
LLAMA_ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

_REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `InputError` when it is missing or holds something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a JSON {type(raw).__name__}; expected an object")
    return raw


def token_ids(directory: Path) -> dict[str, int | list[int]]:
    """The token ids that a checkpoint's `config.json` names, for `hf.save` to write again."""
    return token_ids_of(read_json(Path(directory) / "config.json"))


def token_ids_of(raw: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """The token ids in the entries of a `config.json`."""
    return {name: raw[name] for name in TOKEN_IDS if raw.get(name) is not None}


def family(raw: Mapping[str, Any], path: Path) -> str:
    """The family of a `config.json`."""
    model_type = raw.get("model_type")
    if str(model_type) not in MODEL_TYPES:
        raise InputError(
            f"{path}: model_type={model_type!r} is not supported; expected one of {', '.join(MODEL_TYPES)}"
        )
    return MODEL_TYPES[model_type]


def ties_logits(raw: Mapping[str, Any], path: Path) -> bool:
    """Whether the logits come from the embedding if no other `lm_head.weight` is there; T5 scales its outputs then."""
    fields = Fields(raw, path)
    tied = fields.take("tie_word_embeddings", bool, raw["model_type"] == "t5")
    if raw["model_type"] == "t5":
        # transformers 5 writes scale_decoder_outputs, and tie_word_embeddings true whatever it does.
        return fields.take("scale_decoder_outputs", bool, tied)
    return raw["model_type"] in DECODERS and tied


def read(raw: Mapping[str, Any], path: Path, choices: Mapping[str, Any]) -> ModelConfig:
    """Our configuration; `choices` holds the fields that a `config.json` does not determine."""
    fields = Fields(raw, path)
    fields.expect("is_causal", True)
    fields.expect("per_layer_config", {})
    return (_read_t5 if family(raw, path) == "t5" else _read_llama)(fields, choices)


def write(config: ModelConfig, dtype: str, ids: Mapping[str, int | list[int]] | None) -> dict[str, Any]:
    """The `config.json` of our configuration, tensors of `dtype`; `ids` replaces the usual token ids.

    Raises `InputError` for what these formats cannot express.
    """
    raw = _write_t5(config) if family_of(config) == "t5" else _write_llama(config)
    if ids is not None:
        raw = {name: value for name, value in raw.items() if name not in TOKEN_IDS} | dict(ids)
    return raw | {"dtype": dtype, "use_cache": True}


class Fields:
    """The entries of a file of JSON that describes a model, checked as they are taken; null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], path: Path):
        self.raw, self.path = raw, path

    def take(self, name: str, kind: type, default=_REQUIRED, at_most: float = math.inf):
        """The entry `name`, positive and finite if `kind` is int or float; raises `InputError` when it is not."""
        value = self.raw.get(name)
        if value is None:
            if default is _REQUIRED:
                raise InputError(f"{self.path} has no {name}; expected {_KINDS[kind]}")
            return default
        if kind is float and type(value) is int:
            value = float(value) if value < 2**1023 else math.inf
        if type(value) is not kind or (kind in (int, float) and not 0 < value < math.inf):
            raise InputError(f"{self.path}: {name}={value!r}; expected {_KINDS[kind]}")
        if kind in (int, float) and value > at_most:
            raise InputError(f"{self.path}: {name}={value!r}; expected at most {at_most:,}")
        return value

    def expect(self, name: str, expected: bool | int | str | dict) -> None:
        """Raises `InputError` where the entry `name` is there and another than the only one that we compute."""
        value = self.raw.get(name)
        if value is not None and (type(value) is not type(expected) or value != expected):
            found, expected = json.dumps(value), json.dumps(expected)
            raise InputError(f"{self.path}: {name}={found} is not supported; expected {expected}")

    def choose(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """The entry of `choices` for the text `name`."""
        value = self.take(name, str, default)
        if value not in choices:
            raise InputError(f"{self.path}: {name}={value!r} is not supported; expected one of {', '.join(choices)}")
        return choices[value]

    def kv_heads(self, name: str, default: int) -> KVHeads:
        """A number of key/value heads, or a list of one per layer; the configuration checks what divides what."""
        value = self.raw.get(name)
        if isinstance(value, list):
            return tuple(value)
        return self.take(name, int, default)


_KINDS = {
    int: "a positive integer",
    float: "a positive number",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _read_t5(fields: Fields, choices: Mapping[str, Any]) -> T5Config:
    num_heads = fields.take("num_heads", int, at_most=MAX_HEADS)
    num_layers = fields.take("num_layers", int, at_most=MAX_LAYERS)
    sites = Fields(fields.take("num_key_value_heads", dict, {}), fields.path)
    for site in sites.raw:
        if site not in SITES:
            raise InputError(f"{fields.path}: num_key_value_heads names {site!r}; expected {', '.join(SITES)}")
    # Without the key, t5 means T5 1.0 (not supported), mt5 what we have.
    default_activation = "relu" if fields.raw["model_type"] == "t5" else "gated-gelu"
    activation = fields.choose("feed_forward_proj", T5_ACTIVATIONS, default_activation)
    # transformers derives these two, and lets a file overwrite them.
    fields.expect("dense_act_fn", activation)
    fields.expect("is_gated_act", True)
    # Decoders start from padding, in training, decoding and scores.
    fields.expect("decoder_start_token_id", 0)
    return T5Config(
        vocab_size=fields.take("vocab_size", int),
        d_model=fields.take("d_model", int),
        num_heads=num_heads,
        head_dim=fields.take("d_kv", int),
        d_ff=fields.take("d_ff", int),
        num_encoder_layers=num_layers,
        num_decoder_layers=fields.take("num_decoder_layers", int, num_layers, at_most=MAX_LAYERS),
        **{f"{site}_kv_heads": sites.kv_heads(site, num_heads) for site in SITES},
        relative_buckets=fields.take("relative_attention_num_buckets", int, 32),
        relative_max_distance=fields.take("relative_attention_max_distance", int, 128),
        # A key of our own: stock T5 has one table a stack.
        relative_bias_per_layer=fields.take("relative_bias_per_layer", bool, False),
        activation=activation,
        norm_epsilon=fields.take("layer_norm_epsilon", float, 1e-6),
        **choices,
    )


def _write_t5(config: T5Config) -> dict[str, Any]:
    raw = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "feed_forward_proj": _key_of(T5_ACTIVATIONS, config.activation),
        "dense_act_fn": config.activation,
        "is_gated_act": True,
        "layer_norm_epsilon": config.norm_epsilon,
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.tied_logits,
        "scale_decoder_outputs": config.tied_logits,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    if config.relative_bias_per_layer:
        raw["relative_bias_per_layer"] = True
    if any(kv_heads != config.num_heads for site in SITES for kv_heads in config.kv_heads(site)):
        raw["num_key_value_heads"] = {site: _shortest(config.kv_heads(site)) for site in SITES}
    return raw


def _read_llama(fields: Fields, choices: Mapping[str, Any]) -> LlamaConfig:
    theirs = DECODERS[fields.raw["model_type"]]
    for key in theirs.bias_keys:
        fields.expect(key, False)
    d_model, num_heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int, at_most=MAX_HEADS)
    num_layers = fields.take("num_hidden_layers", int, at_most=MAX_LAYERS)
    # null is as many as query heads whatever the model_type, left out is not.
    num_kv_heads = num_heads if "num_key_value_heads" in fields.raw else theirs.num_kv_heads or num_heads
    # transformers 5 puts everything in rope_parameters; before, theta stood alone beside rope_scaling, which wins.
    rope = Fields(fields.take("rope_scaling", dict, None) or fields.take("rope_parameters", dict, {}), fields.path)
    return LlamaConfig(
        vocab_size=fields.take("vocab_size", int),
        d_model=d_model,
        num_heads=num_heads,
        head_dim=fields.take("head_dim", int, theirs.head_dim or max(d_model // num_heads, 1)),
        d_ff=fields.take("intermediate_size", int),
        num_layers=num_layers,
        decoder_self_kv_heads=fields.kv_heads("num_key_value_heads", num_kv_heads),
        rope_theta=rope.take("rope_theta", float, fields.take("rope_theta", float, 10000.0)),
        rope_scaling=_read_rope_scaling(fields, rope),
        sliding_window=_read_window(fields, theirs, num_layers),
        qkv_bias=theirs.qkv_bias,
        qk_norm=theirs.qk_norm,
        max_position=fields.take("max_position_embeddings", int, theirs.max_position),
        activation=fields.choose("hidden_act", LLAMA_ACTIVATIONS, "silu"),
        norm_epsilon=fields.take("rms_norm_eps", float, 1e-6),
        **choices,
    )


def _read_window(fields: Fields, theirs: _Decoder, num_layers: int) -> int | None:
    """The sliding window of all layers; raises `InputError` where some have one and some not."""
    if theirs.sliding_window is None:
        return None
    window, first = None, 0  # layers before `first` have none
    if not theirs.window_by_layer or fields.take("use_sliding_window", bool, False):
        # null is no window, left out is the default.
        window = fields.take("sliding_window", int, None if "sliding_window" in fields.raw else theirs.sliding_window)
    if theirs.window_by_layer and fields.raw.get("max_window_layers") != 0:
        first = fields.take("max_window_layers", int, 28)
    derived = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(num_layers)]
    types = fields.take("layer_types", list, derived)
    if theirs.window_by_layer or types == derived:  # Mistral's window does not ask for layer_types
        if types == ["full_attention"] * num_layers:
            return None
        if window and types == ["sliding_attention"] * num_layers:
            return window
    found = f"sliding_window={window} and {len(types)} layer_types of {', '.join(sorted(set(map(str, types))))}"
    expected = f"{num_layers} times full_attention, or sliding_attention with a window"
    raise InputError(f"{fields.path}: {found} are not supported; expected {expected}")


def _read_rope_scaling(fields: Fields, rope: Fields) -> RopeScaling | None:
    if nested := [name for name, value in rope.raw.items() if isinstance(value, dict)]:
        raise InputError(f"{rope.path}: RoPE by kind of layer ({nested[0]!r}) is not supported; expected one for all")
    kind = rope.take("rope_type", str, rope.take("type", str, "default"))
    rotary_factor = rope.take("partial_rotary_factor", float, fields.take("partial_rotary_factor", float, 1.0))
    if kind not in ("default", "llama3") or rotary_factor != 1:
        expected = "default or llama3, with partial_rotary_factor 1"
        raise InputError(f"{rope.path}: rope_type={kind!r} is not supported as given; expected {expected}")
    if kind == "default":
        return None
    return RopeScaling(
        factor=rope.take("factor", float),
        low_frequency_factor=rope.take("low_freq_factor", float),
        high_frequency_factor=rope.take("high_freq_factor", float),
        original_max_position=_original_max_position(fields, rope),
    )


def _original_max_position(fields: Fields, rope: Fields) -> int:
    """In the RoPE parameters or beside them, where transformers 5 looks first and transformers 4 never."""
    key = "original_max_position_embeddings"
    beside = fields.take(key, int, None)
    within = rope.take(key, int, _REQUIRED if beside is None else beside)
    if beside not in (None, within):
        raise InputError(f"{rope.path}: {key} is {beside}, and {within} in the RoPE parameters; expected one of them")
    return within


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    model_type = _llama_model_type(config)
    theirs = DECODERS[model_type]
    window = {} if theirs.sliding_window is None else {"sliding_window": config.sliding_window}
    if theirs.window_by_layer:
        window |= {
            "use_sliding_window": config.sliding_window is not None,
            "max_window_layers": 0 if config.sliding_window else config.num_layers,
            "layer_types": ["sliding_attention" if config.sliding_window else "full_attention"] * config.num_layers,
        }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "architectures": [theirs.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": _shortest(config.kv_heads("decoder_self")),
        "head_dim": config.head_dim,
        "hidden_act": _key_of(LLAMA_ACTIVATIONS, config.activation),
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_epsilon,
        # Both forms: readers older than transformers 5 know only the flat one.
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "tie_word_embeddings": config.tied_logits,
        **window,
        **dict.fromkeys(theirs.bias_keys, False),
        **dict(theirs.token_ids),
    }


def _llama_model_type(config: LlamaConfig) -> str:
    if config.qkv_bias and config.qk_norm:
        raise InputError("qkv_bias and qk_norm are true: no model_type of transformers has both; expected one of them")
    if config.qkv_bias or config.qk_norm:
        return "qwen2" if config.qkv_bias else "qwen3"
    # transformers' Llama, unlike its Mistral, refuses widths that the heads do not divide.
    return "llama" if config.sliding_window is None and config.d_model % config.num_heads == 0 else "mistral"


def _key_of(choices: Mapping[str, str], value: str) -> str:
    return next(theirs for theirs, ours in choices.items() if ours == value)


def _shortest(kv_heads: tuple[int, ...]) -> int | list[int]:
    """One number if all layers have it, else the list."""
    return kv_heads[0] if len(set(kv_heads)) == 1 else list(kv_heads)
