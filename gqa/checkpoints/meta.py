"""Meta's Llama folders: `params.json` and `consolidated.NN.pth`, one file for each process of a parallel run.

Llama 1 to 3.3 (text) and Code Llama were published so. Each file has a part of every matrix and all of every norm. A
tensor is put together when it is read, so that no more than it and one part of it are held. Layout: llama/model.py of
meta-llama/llama and models/llama3/model.py of meta-llama/llama-models; it is only read.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gqa.checkpoints.hf_config import Fields, read_json
from gqa.checkpoints.source import Contents, match, some
from gqa.checkpoints.table import FROM_HEADS, LINEAR, SAME, Row
from gqa.checkpoints.tensor import Tensor, equal
from gqa.checkpoints.torch_files import open_torch
from gqa.checkpoints.torch_zip import short
from gqa.errors import InputError
from gqa.models.llama import LlamaConfig
from gqa.nn.position import RopeScaling

PARAMS = "params.json"
# What params.json may say; any other key (a window, experts, adapters, quantisation) is of another model than ours.
KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps")
KEYS += ("rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len")
LLAMA3_VOCAB_SIZE = 128256
# Its tokenizer ends a text at <|end_of_text|>, <|eom_id|> or <|eot_id|>, whether the model is a base or a chat model.
LLAMA3_TOKEN_IDS = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}

_INTERLEAVED = dataclasses.replace(LINEAR, interleaved=True)
# In a layer: name without ".weight" -> our parameter and its transform.
_LAYER = {
    "attention.wq": ("self_attention.query", _INTERLEAVED),
    "attention.wk": ("self_attention.key", _INTERLEAVED),
    "attention.wv": ("self_attention.value", LINEAR),
    "attention.wo": ("self_attention.out", FROM_HEADS),
    "feed_forward.w1": ("mlp.gate", LINEAR),
    "feed_forward.w3": ("mlp.up", LINEAR),
    "feed_forward.w2": ("mlp.down", LINEAR),
    "attention_norm": ("self_attention_norm.scale", SAME),
    "ffn_norm": ("mlp_norm.scale", SAME),
}
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
# Last part of a name -> the axis along which the files have parts of it; norms are whole in every file.
_AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_ROTARY_BUFFERS = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")


def recognises(directory: Path) -> bool:
    """Whether the folder has the weights of a checkpoint of Meta's."""
    return bool(_files(directory))


def read(directory: Path, run_choices: Mapping[str, Any]) -> Contents:
    """What the folder holds, from headers and `params.json`; a format of `gqa.checkpoints`."""
    files = _files(directory)
    expected = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    names = [file.name for file in files]
    if names != expected:
        lacking = next(name for name in expected if name not in names)
        raise InputError(f"{directory} lacks {lacking}; found {some(names)}")
    shards = [open_torch(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if different := sorted(shard.keys() ^ shards[0].keys()):
            raise InputError(f"{files[0]} and {file.name} hold other tensors: only one of them has {some(different)}")
    pairs = [(shard.get(_EMBEDDING), shard.get(_OUTPUT)) for shard in shards]
    tied = all(output is None or (embedding is not None and equal(embedding, output)) for embedding, output in pairs)
    config = _read_config(directory, shards, {**run_choices, "tied_logits": tied})
    axes = _AXES | {"tok_embeddings": int(_parts(directory, shards, _EMBEDDING)[0].shape[1] != config.d_model)}
    rows = _table(config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in shards[0].items():
        parts = [shard[name] for shard in shards]
        tensors[name] = _joined(parts, axes.get(name.split(".")[-2])) if name in rows else tensor

    def ignored(name: str) -> bool:
        return bool(_ROTARY_BUFFERS.fullmatch(name)) or (tied and name == _OUTPUT)

    token_ids = LLAMA3_TOKEN_IDS if config.vocab_size >= LLAMA3_VOCAB_SIZE else None
    return Contents(config, match(directory, rows, tensors, ignored), files, token_ids)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("consolidated.[0-9][0-9].pth"))


def _table(config: LlamaConfig) -> dict[str, Row]:
    rows = {_EMBEDDING: Row("embedding", SAME), "norm.weight": Row("decoder_norm.scale", SAME)}
    for number in range(config.num_layers):
        for theirs, (ours, transform) in _LAYER.items():
            rows[f"layers.{number}.{theirs}.weight"] = Row(f"decoder.{number}.{ours}", transform)
    if not config.tied_logits:
        rows[_OUTPUT] = Row("logits", LINEAR)
    return rows


def _read_config(directory: Path, shards: Sequence[Mapping], choices: Mapping[str, Any]) -> LlamaConfig:
    """Our configuration: sizes that the tensors show are theirs, and `params.json` has to agree."""
    raw = read_json(directory / PARAMS)
    fields = Fields(raw["model"] if isinstance(raw.get("model"), dict) else raw, directory / PARAMS)
    if unknown := sorted(name for name, value in fields.raw.items() if value is not None and name not in KEYS):
        known = ", ".join(KEYS)
        raise InputError(f"{fields.path} sets {short(unknown[0])}, which is not supported; expected only {known}")
    d_model, num_heads = fields.take("dim", int), fields.take("n_heads", int)
    if d_model % num_heads:
        raise InputError(f"{fields.path}: n_heads={num_heads} does not divide dim={d_model}")
    vocab_size, num_layers, d_ff = _sizes(directory, shards, fields, d_model)
    freqs = {tensor.shape for name, tensor in shards[0].items() if _ROTARY_BUFFERS.fullmatch(name)}
    if freqs - {(d_model // num_heads // 2,)}:
        found = f"n_heads={num_heads} of dim={d_model}, but rope.freqs has shape {list(max(freqs))}"
        raise InputError(f"{fields.path} says {found}; expected half a head, [{d_model // num_heads // 2}]")
    scaled = fields.take("use_scaled_rope", bool, False)
    rope_theta, norm_epsilon = fields.take("rope_theta", float, 10000.0), fields.take("norm_eps", float, 1e-5)
    # Neither the stretching of the rotary frequencies nor the context length is in params.json. Llama 3.2's 1B and 3B,
    # which alone have tied logits, are stretched by 32, all others by 8 (llama-models issue 241).
    scaling = RopeScaling(32.0 if choices["tied_logits"] else 8.0, 1.0, 4.0, 8192) if scaled else None
    if scaled:
        max_position = 131072
    elif vocab_size >= LLAMA3_VOCAB_SIZE:
        max_position = 8192
    elif rope_theta > 10000:  # Code Llama
        max_position = 16384
    else:
        max_position = 2048 if norm_epsilon < 1e-5 else 4096  # Llama 1 (but for its 65B), Llama 2
    return LlamaConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=d_ff,
        num_layers=num_layers,
        decoder_self_kv_heads=fields.take("n_kv_heads", int, num_heads),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        sliding_window=None,
        qkv_bias=False,
        qk_norm=False,
        max_position=max_position,
        activation="silu",
        norm_epsilon=norm_epsilon,
        **choices,
    )


def _sizes(directory: Path, shards: Sequence[Mapping], fields: Fields, d_model: int) -> tuple[int, int, int]:
    """Vocabulary, number of layers and MLP width by the tensors, which params.json has to agree with."""
    rows, width = _parts(directory, shards, "layers.0.attention.wq.weight")[0].shape
    if width != d_model:
        raise InputError(f"{fields.path} says dim={d_model}, the tensors have {width}")
    if rows * len(shards) != d_model:
        raise InputError(
            f"{directory} has {len(shards)} file(s) with {rows} rows each of layers.0.attention.wq.weight; "
            f"expected {d_model} rows in all, as dim in {PARAMS}"
        )
    embedding_rows, embedding_width = _parts(directory, shards, _EMBEDDING)[0].shape
    vocab_size = embedding_rows if embedding_width != d_model else embedding_rows * len(shards)
    num_layers = len({name.split(".")[1] for name in shards[0] if re.match(r"layers\.\d+\.", name)})
    d_ff = _parts(directory, shards, "layers.0.feed_forward.w1.weight")[0].shape[0] * len(shards)
    said_vocab_size = None if fields.raw.get("vocab_size") == -1 else fields.take("vocab_size", int, None)
    for what, found, said in (
        ("n_layers", num_layers, fields.take("n_layers", int)),
        ("vocab_size", vocab_size, said_vocab_size),
        ("MLP width (by dim, multiple_of and ffn_dim_multiplier)", d_ff, _mlp_width(fields)),
    ):
        if said is not None and found != said:
            raise InputError(f"{fields.path} says {what}={said}, the tensors have {found}")
    return vocab_size, num_layers, d_ff


def _mlp_width(fields: Fields) -> int | None:
    """The MLP's width by Meta's formula; None where params.json does not say to what it is rounded."""
    multiple, factor = fields.take("multiple_of", int, None), fields.take("ffn_dim_multiplier", float, 1.0)
    if multiple is None:
        return None
    width = int(min(factor * int(8 * fields.raw["dim"] / 3), 2.0**62))
    return -(-width // multiple) * multiple


def _parts(directory: Path, shards: Sequence[Mapping], name: str) -> list[Tensor]:
    """The parts of a matrix."""
    if name not in shards[0]:
        raise InputError(f"{directory} lacks the tensor {name}; found {some(sorted(shards[0])) or 'none'}")
    parts = [shard[name] for shard in shards]
    if len(parts[0].shape) != 2:
        raise InputError(f"{name} in {parts[0].file} has shape {list(parts[0].shape)}; expected a matrix")
    return parts


def _joined(parts: Sequence[Tensor], axis: int | None) -> Tensor:
    """The tensor that the files have parts of along `axis`, or, where that is None, all of each."""
    first = parts[0]
    for part in parts:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            found = " and ".join(f"{list(p.shape)} of {p.dtype} in {p.file.name}" for p in (first, part))
            raise InputError(f"{first.name} in {first.file.parent} is {found}; expected equal parts")
    if len(parts) == 1:
        return first
    if axis is None:
        for part in parts:
            if None not in (first.checksum, part.checksum) and first.checksum != part.checksum:
                raise _differ(first, part)
        return Tensor(first.name, first.file, first.shape, first.dtype, partial(_read_equal, parts))
    if len(first.shape) != 2:
        raise InputError(f"{first.name} in {first.file} has shape {list(first.shape)}; expected a matrix")
    shape = tuple(size * len(parts) if i == axis else size for i, size in enumerate(first.shape))
    return Tensor(first.name, first.file, shape, first.dtype, partial(_read_joined, parts, axis, shape))


def _read_joined(parts: Sequence[Tensor], axis: int, shape: tuple[int, ...]) -> np.ndarray:
    whole = np.empty(shape, parts[0].dtype)
    for part, place in zip(parts, np.split(whole, len(parts), axis), strict=True):
        place[...] = part.read()
    return whole


def _read_equal(parts: Sequence[Tensor]) -> np.ndarray:
    first = parts[0].read()
    for part in parts[1:]:
        if part.read().tobytes() != first.tobytes():
            raise _differ(parts[0], part)
    return first


def _differ(first: Tensor, other: Tensor) -> InputError:
    return InputError(f"{first.name} of {first.file.parent} differs in {first.file.name} and {other.file.name}")
