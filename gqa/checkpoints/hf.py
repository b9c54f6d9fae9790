"""Hugging Face directories (`config.json` and safetensors) of T5.1.1 and Llama, read and written without torch.

One table per family maps their tensor names to our parameters (`table`). Key/value heads: Llama's stock key
`num_key_value_heads` may also be a list with one number per layer, where layers differ. Stock T5 has no such key; where
a site has fewer key/value than query heads, the k and v weights are `[K*d, D]` and `config.json` gains
`"num_key_value_heads": {"encoder_self": 64, "decoder_self": 8, "cross": 8}` (each a number or a list). Stock
transformers loads multi-head T5, and Llama with one number for all layers.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from gqa import models, sharding
from gqa.checkpoints import hf_config
from gqa.checkpoints.table import FROM_HEADS, LINEAR, SAME, Parameter, Row, Transform, parameters
from gqa.errors import InputError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
READ_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
SAVED_DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 5_000_000_000  # a larger model is written as several files with an index, as transformers does


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
        # The table of the first layer serves all.
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows[bias] = Row(f"{side}_bias.table", SAME)
        for number in range(num_layers):
            ours, theirs = f"{side}.{number}", f"{side}.block.{number}.layer"
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
        for name in ("gate", "up", "down"):
            rows[f"{theirs}.mlp.{name}_proj.weight"] = Row(f"{ours}.mlp.{name}", LINEAR)
        rows[f"{theirs}.input_layernorm.weight"] = Row(f"{ours}.self_attention_norm.scale", SAME)
        rows[f"{theirs}.post_attention_layernorm.weight"] = Row(f"{ours}.mlp_norm.scale", SAME)
    if not config.tied_logits:
        rows["lm_head.weight"] = Row("logits", LINEAR)
    return rows


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


def read_config(
    directory: str | os.PathLike, *, dtype: str, param_dtype: str, scan_layers: bool, remat: str, dropout_rate: float
) -> models.ModelConfig:
    """The architecture of the checkpoint in `directory`; how it is run is the caller's choice.

    Raises `InputError` when `config.json` or the weights are missing, damaged or of an unsupported architecture.
    """
    run = dict(dtype=dtype, param_dtype=param_dtype, scan_layers=scan_layers, remat=remat, dropout_rate=dropout_rate)
    with _open_tensors(Path(directory)) as tensors:
        return _read_sources(Path(directory), tensors, run)[0]


def load(directory: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, **run_choices) -> models.Model:
    """The model in `directory`, its parameters in `param_dtype`, each created where it belongs.

    Args:
      directory: a folder with `config.json` and `model.safetensors`, or an index of several files.
      mesh: parameters are sharded over it by `gqa.sharding`; `None`: the default device.
      run_choices: the keywords of `read_config`.

    Raises `InputError`, before anything is allocated, for what `read_config` refuses and for tensors that are missing,
    unknown, set twice or of another shape.
    """
    directory = Path(directory)
    with _open_tensors(directory) as tensors:
        config, sources = _read_sources(directory, tensors, run_choices)
        abstract = models.abstract(config)
        ours = parameters(abstract)
        _check_shapes(directory, tensors, sources, ours)
        if mesh is None:
            placements = [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(ours)
        else:
            placements = jax.tree.leaves(sharding.parameter_shardings(mesh, abstract))

        def read(path: str, shape: tuple[int, ...]) -> np.ndarray:
            name, transform = sources[path]
            return transform.to_ours(tensors[name].get_tensor(name), shape)

        arrays = []
        total = sum(parameter.nbytes for parameter in ours)
        with tqdm(total=total, desc="load", unit="B", unit_scale=True, delay=1) as bar:
            for parameter, placement in zip(ours, placements, strict=True):
                arrays.append(parameter.assemble(placement, partial(read, shape=parameter.layer_shape)))
                bar.update(parameter.nbytes)
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


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
    directory, extra_files = Path(directory), [Path(file) for file in extra_files]
    if dtype not in SAVED_DTYPES:
        raise InputError(f"dtype={dtype!r} cannot be saved; expected one of {', '.join(SAVED_DTYPES)}")
    if directory.exists():
        raise InputError(f"{directory} exists already; name a new directory")
    for file in extra_files:
        if not file.is_file():
            raise InputError(f"{file} is not a file; expected a tokenizer file to copy")
        if file.name in (WEIGHTS, INDEX, CONFIG):
            raise InputError(f"{file} would overwrite the model's own {file.name}")
    config_json = hf_config.write(model.config, dtype, token_ids)
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    unfinished.mkdir(parents=True)
    try:
        _write_weights(model, unfinished, np.dtype(dtype))
        (unfinished / CONFIG).write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")
        for file in extra_files:
            shutil.copyfile(file, unfinished / file.name)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def _open_tensors(directory: Path) -> Iterator[dict[str, safe_open]]:
    """The open file of every tensor of a checkpoint, by name."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; expected one with {CONFIG} and {WEIGHTS}")
    indexed: dict[str, str] | None = None
    if (directory / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (directory / INDEX).is_file():
        indexed = hf_config.read_json(directory / INDEX).get("weight_map")
        if not isinstance(indexed, dict) or not all(isinstance(file, str) for file in indexed.values()):
            raise InputError(f"{directory / INDEX} has no weight_map of tensor names to file names")
        files = sorted(set(indexed.values()))
    else:
        found = _some(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise InputError(f"{directory} has no {WEIGHTS} and no {INDEX}; found {found}")
    with contextlib.ExitStack() as stack:
        tensors: dict[str, safe_open] = {}
        places: dict[str, str] = {}
        for file in files:
            if Path(file).name != file or file == "..":
                raise InputError(f"{directory / INDEX} names the file {file!r}; expected a file name without a folder")
            if not (directory / file).is_file():
                raise InputError(f"{directory / INDEX} names {file}, which is missing")
            try:
                handle = stack.enter_context(safe_open(directory / file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{directory / file} is not a readable safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if name in tensors:
                    raise InputError(f"{name} is set twice: in {places[name]} and {file} of {directory}")
                tensors[name], places[name] = handle, file
        if indexed is not None and places != indexed:
            wrong = sorted(name for name in {**places, **indexed} if places.get(name) != indexed.get(name))
            raise InputError(f"{directory / INDEX} does not describe its files: {_some(wrong)} not where it says")
        yield tensors


def _read_sources(
    directory: Path, tensors: Mapping[str, safe_open], run_choices: dict
) -> tuple[models.ModelConfig, dict[str, tuple[str, Transform]]]:
    """The architecture, and for each of our parameters the tensor that it comes from with its transform."""
    raw = hf_config.read_json(directory / CONFIG)
    family = hf_config.family(raw, directory / CONFIG)
    names = _NAMES[family]
    embeddings = [name for name in names.embedding if name in tensors]
    if not embeddings:
        found = _some(sorted(tensors)) or "none"
        raise InputError(f"{directory} lacks the tensor {names.embedding[0]}; found {found}")
    # Two traps of transformers 5: what ties T5's logits is that lm_head.weight is not there, whatever the config says;
    # and equal copies of the embedding may or may not be written.
    ties = hf_config.ties_logits(raw)
    own_logits = "lm_head.weight" in tensors
    if ties and own_logits and _equal(tensors, embeddings[0], "lm_head.weight"):
        own_logits = False
        embeddings.append("lm_head.weight")
    for copy in embeddings[1:]:
        if not _equal(tensors, embeddings[0], copy):
            raise InputError(f"the embedding is set twice in {directory}: {embeddings[0]} and {copy} differ")
    config = hf_config.read(raw, directory / CONFIG, run_choices | {"tied_logits": ties and not own_logits})
    sources = {row.path: (name, row.transform) for name, row in names.table(config).items()}
    sources["embedding"] = (embeddings[0], SAME)
    if family == "t5" and not ties and not own_logits:
        # transformers 5 ties the T5.1.1 models that it initialises, without scaling their outputs: no form of ours,
        # but a logits kernel of its own, equal to the embedding, computes the same.
        sources["logits"] = (embeddings[0], LINEAR)
    elif family == "t5" and ties and own_logits:
        sources["logits"] = ("lm_head.weight", dataclasses.replace(LINEAR, factor=config.d_model**-0.5))
    used = {name for name, _ in sources.values()} | set(embeddings)
    missing = sorted(used - set(tensors))
    unknown = sorted(name for name in set(tensors) - used if not names.ignored.fullmatch(name))
    for what, wrong in (("lacks", missing), ("has unknown", unknown)):
        if wrong:
            raise InputError(f"{directory} {what} {len(wrong)} tensor(s) for its {CONFIG}: {_some(wrong)}")
    return config, sources


def _equal(tensors: Mapping[str, safe_open], name: str, other: str) -> bool:
    return np.array_equal(tensors[name].get_tensor(name), tensors[other].get_tensor(other))


def _check_shapes(directory: Path, tensors, sources, parameters: Sequence[Parameter]) -> None:
    for parameter in parameters:
        for path in parameter.paths:
            name, transform = sources[path]
            found, expected = tensors[name].get_slice(name), list(transform.their_shape(parameter.layer_shape))
            if found.get_shape() != expected:
                raise InputError(
                    f"{name} in {directory} has shape {found.get_shape()}; expected {expected} by {CONFIG}"
                )
            if found.get_dtype() not in READ_DTYPES:
                expected = ", ".join(READ_DTYPES)
                raise InputError(f"{name} in {directory} has type {found.get_dtype()}; expected one of {expected}")


def _write_weights(model: models.Model, directory: Path, dtype: np.dtype) -> None:
    """One `model.safetensors`, or several of at most `SHARD_BYTES` (or one tensor) and their index."""
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}

    def flush():
        # transformers refuses files without this entry.
        path = directory / f"{len(shards)}.safetensors"
        save_file(waiting, path, metadata={"format": "pt"})
        path.chmod(directory.stat().st_mode & 0o666)  # safetensors writes for the owner alone
        shards.append(list(waiting))
        waiting.clear()

    total = models.num_parameters(model) * dtype.itemsize
    with tqdm(total=total, desc="save", unit="B", unit_scale=True, delay=1) as bar:
        for name, tensor in named_tensors(model):
            if waiting and sum(t.nbytes for t in waiting.values()) + tensor.size * dtype.itemsize > SHARD_BYTES:
                flush()
            waiting[name] = np.ascontiguousarray(tensor, dtype)
            bar.update(waiting[name].nbytes)
        flush()
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / WEIGHTS)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"{number}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
