"""Hugging Face directories (`config.json` and weights) of T5.1.1 and Llama-like models, read and written without torch.

Weights are safetensors, in one file or several with an index, or PyTorch's `pytorch_model*.bin`. One table per family
maps their tensor names to our parameters (`table`). Key/value heads: Llama's stock key `num_key_value_heads` may also
be a list with one number per layer, where layers differ. Stock T5 has no such key; where a site has fewer key/value
than query heads, the k and v weights are `[K*d, D]` and `config.json` gains
`"num_key_value_heads": {"encoder_self": 64, "decoder_self": 8, "cross": 8}` (each a number or a list). Stock
transformers loads multi-head T5, and Llama with one number for all layers.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gqa import models
from gqa.checkpoints import hf_config, writer
from gqa.checkpoints.source import GENERATION_CONFIG, Contents, match, some
from gqa.checkpoints.table import FLAT, FROM_HEADS, LINEAR, SAME, Row, parameters
from gqa.checkpoints.tensor import Tensor, equal, open_safetensors
from gqa.checkpoints.torch_files import open_torch
from gqa.checkpoints.writer import INDEX, WEIGHTS
from gqa.errors import InputError

CONFIG = "config.json"
SAVED_DTYPES = ("float32", "bfloat16")
# File of weights -> its index, in the order in which they are looked for.
WEIGHT_FILES = {WEIGHTS: INDEX, "pytorch_model.bin": "pytorch_model.bin.index.json"}
READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {".safetensors": open_safetensors, ".bin": open_torch}


def _attention_rows(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, Row]:
    transforms = {"query": LINEAR, "key": LINEAR, "value": LINEAR, "out": FROM_HEADS}
    return {f"{theirs}.{names[kind]}.weight": Row(f"{ours}.{kind}", transforms[kind]) for kind in names}


def _t5_table(config: models.t5.T5Config) -> dict[str, Row]:
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    rows = {"shared.weight": Row("embedding", SAME)}
    sides = {
        "encoder": (config.num_encoder_layers, [("SelfAttention", "self_attention")]),
        "decoder": (
            config.num_decoder_layers,
            [("SelfAttention", "self_attention"), ("EncDecAttention", "cross_attention")],
        ),
    }
    for side, (num_layers, attentions) in sides.items():
        for number in range(num_layers):
            ours, theirs = f"{side}.{number}", f"{side}.block.{number}.layer"
            bias = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
            if config.relative_bias_per_layer:
                rows[bias] = Row(f"{ours}.relative_bias.table", SAME)
            elif number == 0:  # the table of the first layer serves all
                rows[bias] = Row(f"{side}_bias.table", SAME)
            for i, (their_name, our_name) in enumerate(attentions):
                rows |= _attention_rows(f"{theirs}.{i}.{their_name}", f"{ours}.{our_name}", names)
                rows[f"{theirs}.{i}.layer_norm.weight"] = Row(f"{ours}.{our_name}_norm.scale", SAME)
            last = f"{theirs}.{len(attentions)}"
            for their_name, our_name in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
                rows[f"{last}.DenseReluDense.{their_name}.weight"] = Row(f"{ours}.mlp.{our_name}", LINEAR)
            rows[f"{last}.layer_norm.weight"] = Row(f"{ours}.mlp_norm.scale", SAME)
        rows[f"{side}.final_layer_norm.weight"] = Row(f"{side}_norm.scale", SAME)
    if not config.tied_logits:
        rows["lm_head.weight"] = Row("logits", LINEAR)
    return rows


def _llama_table(config: models.llama.LlamaConfig) -> dict[str, Row]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    rows = {"model.embed_tokens.weight": Row("embedding", SAME), "model.norm.weight": Row("decoder_norm.scale", SAME)}
    for number in range(config.num_layers):
        ours, theirs = f"decoder.{number}", f"model.layers.{number}"
        rows |= _attention_rows(f"{theirs}.self_attn", f"{ours}.self_attention", names)
        for kind in ("query", "key", "value") if config.qkv_bias else ():
            rows[f"{theirs}.self_attn.{names[kind]}.bias"] = Row(f"{ours}.self_attention.{kind}_bias", FLAT)
        for kind in ("query", "key") if config.qk_norm else ():
            norm = f"{theirs}.self_attn.{kind[0]}_norm.weight"
            rows[norm] = Row(f"{ours}.self_attention.{kind}_norm.scale", SAME)
        for name in ("gate", "up", "down"):
            rows[f"{theirs}.mlp.{name}_proj.weight"] = Row(f"{ours}.mlp.{name}", LINEAR)
        rows[f"{theirs}.input_layernorm.weight"] = Row(f"{ours}.self_attention_norm.scale", SAME)
        rows[f"{theirs}.post_attention_layernorm.weight"] = Row(f"{ours}.mlp_norm.scale", SAME)
    if not config.tied_logits:
        rows["lm_head.weight"] = Row("logits", LINEAR)
    return rows


SAME_EMBEDDING = Row("embedding", SAME)


class _Names(NamedTuple):
    """What the tensor names of a family need beside the table."""

    table: Callable[[Any], dict[str, Row]]
    embedding: tuple[str, ...]  # names under which the embedding is found, possibly under several at once
    ignored: re.Pattern  # tensors of old files that nothing reads


_NAMES = {
    "t5": _Names(
        _t5_table,
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
    ),
    "llama": _Names(
        _llama_table,
        ("model.embed_tokens.weight",),
        re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    ),
}


def table(config: models.ModelConfig) -> dict[str, Row]:
    """Every tensor of a checkpoint of this architecture: their name -> our parameter and the transform."""
    return _NAMES[models.family_of(config)].table(config)


def recognises(directory: Path) -> bool:
    """Whether the folder has the weights of a Hugging Face checkpoint."""
    return any((directory / name).is_file() for pair in WEIGHT_FILES.items() for name in pair)


def read(directory: Path, run_choices: Mapping[str, Any]) -> Contents:
    """What the folder holds, from headers and `config.json`; a format of `gqa.checkpoints`."""
    tensors = _open(directory)
    raw = hf_config.read_json(directory / CONFIG)
    family = hf_config.family(raw, directory / CONFIG)
    names = _NAMES[family]
    embeddings = [name for name in names.embedding if name in tensors]
    if not embeddings:
        found = some(sorted(tensors)) or "none"
        raise InputError(f"{directory} lacks the tensor {names.embedding[0]}; found {found}")
    # Two traps of transformers 5: what ties T5's logits is that lm_head.weight is not there, whatever the config says;
    # and equal copies of the embedding may or may not be written.
    ties = hf_config.ties_logits(raw, directory / CONFIG)
    own_logits = "lm_head.weight" in tensors
    if ties and own_logits and equal(tensors[embeddings[0]], tensors["lm_head.weight"]):
        own_logits = False
        embeddings.append("lm_head.weight")
    for copy in embeddings[1:]:
        if not equal(tensors[embeddings[0]], tensors[copy]):
            raise InputError(f"the embedding is set twice in {directory}: {embeddings[0]} and {copy} differ")
    config = hf_config.read(raw, directory / CONFIG, {**run_choices, "tied_logits": ties and not own_logits})
    if family == "t5" and (generation := directory / GENERATION_CONFIG).is_file():
        # Where it says with what decoding starts, config.json need not.
        hf_config.Fields(hf_config.read_json(generation), generation).expect("decoder_start_token_id", 0)
    rows = names.table(config)
    rows = {embeddings[0]: SAME_EMBEDDING} | {name: row for name, row in rows.items() if row.path != "embedding"}
    logits_from_embedding = family == "t5" and not ties and not own_logits
    if logits_from_embedding:
        # transformers 5 ties the T5.1.1 models that it initialises, without scaling their outputs: no form of ours,
        # but a logits kernel of its own, equal to the embedding, computes the same.
        rows = {name: row for name, row in rows.items() if row.path != "logits"}
    elif family == "t5" and ties and own_logits:
        rows["lm_head.weight"] = Row("logits", dataclasses.replace(LINEAR, factor=config.d_model**-0.5))

    def ignored(name: str) -> bool:
        # Old PyTorch files hold buffers of masks and positions beside the weights, which are never integers.
        buffer = tensors[name].dtype.kind in "biu"
        return name in embeddings or buffer or bool(names.ignored.fullmatch(name))

    sources = match(directory, rows, tensors, ignored)
    if logits_from_embedding:
        sources["logits"] = (tensors[embeddings[0]], LINEAR)
    files = sorted({tensor.file for tensor in tensors.values()})
    return Contents(config, sources, files, hf_config.token_ids(directory))


def named_tensors(model: models.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Their name and layout of every parameter, one at a time; gradients of a model have the same names."""
    names = {row.path: (name, row.transform) for name, row in table(model.config).items()}
    for parameter in parameters(model):
        array = np.asarray(jax.device_get(parameter.array))
        for number, path in enumerate(parameter.paths):
            name, transform = names[path]
            yield name, transform.to_theirs(array[number] if parameter.stacked else array)


def save(
    model: models.Model,
    directory: str | os.PathLike,
    *,
    dtype: str,
    token_ids: Mapping[str, int | list[int]] | None = None,
    extra_files: Sequence[str | os.PathLike] = (),
) -> None:
    """Writes `config.json` and the weights to a new `directory`, which appears only when it is complete.

    Args:
      model: any of ours, stacked or not.
      dtype: of the tensors written, one of `SAVED_DTYPES`.
      token_ids: `bos_token_id`, `eos_token_id`, … for `config.json` (`hf_config.token_ids` reads a checkpoint's);
        `None`: those of T5 and Llama 2.
      extra_files: tokenizer files and the like, copied under their own names.

    Raises `InputError` when `directory` exists, an extra file is missing or their formats cannot express the model.
    """
    found = {
        path: (parameter, number) for parameter in parameters(model) for number, path in enumerate(parameter.paths)
    }

    def read_path(path: str) -> np.ndarray:
        parameter, number = found[path]
        return np.asarray(jax.device_get(parameter.array[number] if parameter.stacked else parameter.array))

    extra_files = [Path(file) for file in extra_files]
    for file in extra_files:
        if not file.is_file():
            raise InputError(f"{file} is not a file; expected a tokenizer file to copy")
        if file.name in (WEIGHTS, INDEX, CONFIG):
            raise InputError(f"{file} would overwrite the model's own {file.name}")
    other_files = {file.name: file for file in extra_files}
    write(model.config, read_path, Path(directory), dtype, token_ids, lambda sums: other_files, identity=None)


def write(
    config: models.ModelConfig,
    read_path: Callable[[str], np.ndarray],
    directory: Path,
    dtype: str,
    token_ids: Mapping[str, int | list[int]] | None,
    other_files: Callable[[Mapping[str, str]], Mapping[str, bytes | Path]],
    identity: Mapping | None,
    order: Sequence[str] = (),
) -> None:
    """Writes a checkpoint tensor by tensor, whose parameters `read_path` gives by path.

    `dtype`, `token_ids`: as of `save`; `other_files`, `identity`: as of `writer.write`; `order`: paths in the order in
    which they are best read, by default that of the layers.
    """
    if dtype not in SAVED_DTYPES:
        raise InputError(f"dtype={dtype!r} cannot be saved; expected one of {', '.join(SAVED_DTYPES)}")
    config_json = hf_config.write(config, dtype, token_ids)
    shapes = {
        path: parameter.layer_shape for parameter in parameters(models.abstract(config)) for path in parameter.paths
    }

    def make(row: Row) -> np.ndarray:
        return row.transform.to_theirs(read_path(row.path))

    rank = {path: number for number, path in enumerate(order)}
    entries = [
        writer.Entry(name, row.transform.their_shape(shapes[row.path]), partial(make, row))
        for name, row in sorted(table(config).items(), key=lambda item: rank.get(item[1].path, len(rank)))
    ]
    configuration = (json.dumps(config_json, indent=2, sort_keys=True) + "\n").encode()
    writer.write(
        directory, entries, np.dtype(dtype), lambda sums: {CONFIG: configuration, **other_files(sums)}, identity
    )


def _open(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weights by name."""
    for single, index in WEIGHT_FILES.items():
        if (directory / single).is_file():
            return READERS[Path(single).suffix](directory / single)
        if (directory / index).is_file():
            return _open_indexed(directory, directory / index)
    raise InputError(f"{directory} has no {' and no '.join(WEIGHT_FILES)}")


def _open_indexed(directory: Path, index: Path) -> dict[str, Tensor]:
    content = hf_config.read_json(index).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(file, str) for file in content.values()):
        raise InputError(f"{index} has no weight_map of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(content.values())):
        if Path(file).name != file or file == ".." or Path(file).suffix not in READERS:
            raise InputError(
                f"{index} names the file {file!r}; expected the name of a file of weights without a folder"
            )
        if not (directory / file).is_file():
            raise InputError(f"{index} names {file}, which is missing")
        for name, tensor in READERS[Path(file).suffix](directory / file).items():
            if name in tensors:
                raise InputError(f"{name} is set twice: in {tensors[name].file.name} and {file} of {directory}")
            tensors[name] = tensor
    places = {name: tensor.file.name for name, tensor in tensors.items()}
    if places != content:
        wrong = sorted(name for name in {**places, **content} if places.get(name) != content.get(name))
        raise InputError(f"{index} does not describe its files: {some(wrong)} not where it says")
    return tensors
