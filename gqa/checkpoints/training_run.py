"""A training run of ours as a checkpoint, finished or not: its folder, its `checkpoints/`, or one step's folder there.

The architecture is in the run's `architecture.json`, keys as in a Hugging Face `config.json`. Of a step, only the
model's parameters are read, each when it is asked for. Our names: `gqa.checkpoints.store` writes them.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from gqa import models
from gqa.checkpoints import hf_config
from gqa.checkpoints.source import Contents, companions, match
from gqa.checkpoints.sums import hash_files, read_sums
from gqa.checkpoints.table import SAME, Row, parameters
from gqa.checkpoints.tensor import Tensor
from gqa.checkpoints.writer import SUMS
from gqa.errors import InputError

ARCHITECTURE = "architecture.json"
CONFIG, MODEL, STEPS = "config.json", "model", "checkpoints"  # of a run's folder
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
ARRAYS = "default"  # of a step: where Orbax puts its arrays
SAVE = "save.json"  # of a step: what there is to know of it
_MODEL_KEY, _POLICY_KEY = ".model", ".policy.model"  # the second of a run of gqa.ppo
# A stack of layers is one chunk of its file, and layers are asked for one by one.
_CACHE_BYTES = 1 << 29


def recognises(directory: Path) -> bool:
    """Whether the folder is a run's, its steps', or one of these."""
    return (directory / STEPS).is_dir() or bool(_steps(directory)) or _is_step(directory)


def read(directory: Path, run_choices: Mapping[str, Any]) -> Contents:
    """What a run's newest complete step (or the step named) holds; a format of `gqa.checkpoints`."""
    steps = directory / STEPS if (directory / STEPS).is_dir() else directory
    step = (
        directory if _is_step(directory) else next(iter(sorted(_steps(steps), key=lambda path: -int(path.name))), None)
    )
    if step is None:
        raise InputError(f"{steps} holds no complete step yet; wait for the run's first checkpoint")
    workdir = step.absolute().parent.parent
    if not (workdir / ARCHITECTURE).is_file():
        instead = f"use {workdir / MODEL}" if (workdir / MODEL).is_dir() else "start the run once more"
        raise InputError(f"{workdir} has no {ARCHITECTURE}, which a run writes when it starts; {instead}")
    for what in ("adapter", "reward"):
        if isinstance(section := _run_config(workdir).get(what), Mapping):
            instead = f"use {workdir / MODEL}, which is there at its end"
            if what == "adapter" and section.get("base") is not None:
                instead = f"merge {workdir / 'adapter'} with python -m checkpoints_tools.merge"
            raise InputError(f"{workdir} trains {what} parameters; {instead}")
    raw = hf_config.read_json(workdir / ARCHITECTURE)
    hf_config.family(raw, workdir / ARCHITECTURE)
    choices = {**run_choices, "tied_logits": hf_config.ties_logits(raw, workdir / ARCHITECTURE)}
    config = hf_config.read(raw, workdir / ARCHITECTURE, choices)
    key = _POLICY_KEY if "ppo" in _run_config(workdir) else _MODEL_KEY
    table, tensors = _table(config, key), _open(step, key)
    sources = match(step, table, tensors, ignored=lambda name: False)
    return Contents(config, sources, files_of(step), hf_config.token_ids_of(raw), _companions(workdir))


def has_steps(workdir: Path) -> bool:
    """Whether a run has kept a complete step there."""
    return (workdir / STEPS).is_dir() and bool(_steps(workdir / STEPS))


def step_folders(workdir: Path) -> list[Path]:
    """The complete steps that a run has kept, first to last; `InputError` for a folder that is no run's."""
    if not (workdir / STEPS).is_dir():
        raise InputError(f"{workdir} has no folder {STEPS}; expected a run's WORKDIR")
    found = sorted(_steps(workdir / STEPS), key=lambda path: int(path.name))
    if not found:
        raise InputError(f"{workdir / STEPS} holds no complete step yet; wait for the run's first checkpoint")
    return found


def problem_of(folder: Path) -> str | None:
    """What is wrong with a step's files, or None; the sizes are compared before anything large is read.

    Hidden files that it was not saved with are no damage: desktops and network file systems leave them anywhere.
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    try:
        sums = read_sums(folder)
        found = {path.relative_to(folder).as_posix(): path for path in files_of(folder) if path.name != SUMS}
        found = {name: path for name, path in found.items() if name in sums or not path.name.startswith(".")}
        if not sums:
            return f"{folder} has no {SUMS}"
        for name in sorted({*sums, *found, SAVE}):
            if name not in found:
                return f"{folder / name} is missing"
            if name not in sums:
                return f"{folder / name} is not in {SUMS}"
        hash_files(folder, [found[SAVE]], sums)
        for name, size in hf_config.read_json(folder / SAVE)["bytes"].items():
            if found[name].stat().st_size != size:
                return f"{folder / name} has {found[name].stat().st_size} bytes; expected {size}"
        hash_files(folder, list(found.values()), sums)
    except (InputError, OSError) as error:
        return str(error)
    return None


def files_of(folder: Path) -> list[Path]:
    """All files below `folder`, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_step(directory: Path) -> bool:
    # A step under way has a longer name.
    return directory.name.isdecimal() and (directory / ARRAYS / "manifest.ocdbt").is_file()


def _steps(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if _is_step(path)]


def _table(config: models.ModelConfig, model_key: str) -> dict[str, Row]:
    abstract = models.abstract(config)
    rows = {}
    for (key_path, _), parameter in zip(
        jax.tree_util.tree_leaves_with_path(abstract), parameters(abstract), strict=True
    ):
        key = model_key + jax.tree_util.keystr(key_path)
        for number, path in enumerate(parameter.paths):
            rows[_name(key, number) if parameter.stacked else key] = Row(path, SAME)
    return rows


def _name(key: str, layer: int) -> str:
    return f"{key}[{layer}]"


def _open(step: Path, model_key: str) -> dict[str, Tensor]:
    """The model's parameters in a step's folder, those of a stack one by one; the first to be read checks all sums."""
    arrays, check = step / ARRAYS, cache(partial(_check, step))
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    base = f"file://{arrays.absolute()}/"
    tensors = {}
    try:
        keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result().list().result()
        names = sorted({key.decode().rpartition("/")[0] for key in keys})
        for key in (name for name in names if name.startswith(f"{model_key}.")):
            store = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, context=context).result()
            dtype, shape = array.dtype.numpy_dtype, tuple(array.shape)
            if key.startswith((f"{model_key}.encoder[", f"{model_key}.decoder[")):
                for layer in range(shape[0]):
                    read = partial(_read, check, arrays, key, array, layer)
                    tensors[_name(key, layer)] = Tensor(_name(key, layer), arrays, shape[1:], dtype, read)
            else:
                tensors[key] = Tensor(key, arrays, shape, dtype, partial(_read, check, arrays, key, array, ...))
    except (ValueError, OSError) as error:
        raise InputError(f"{arrays} cannot be read: {error}") from error
    return tensors


def _check(step: Path) -> None:
    """Orbax restores flipped bits without a word."""
    if problem := problem_of(step):
        others = sorted((path.name for path in _steps(step.absolute().parent) if path.name != step.name), key=int)
        instead = f"expected a whole step, such as {step.parent / others[-1]}" if others else "it is the only step"
        raise InputError(f"{problem}; {instead}")


def _read(check: Callable[[], None], arrays: Path, key: str, array: tensorstore.TensorStore, index) -> np.ndarray:
    check()
    try:
        return array[index].read().result()
    except (ValueError, OSError) as error:
        raise InputError(f"{key} of {arrays} cannot be read: {error}") from error


def _companions(workdir: Path) -> list[Path]:
    """A finished run's model has them beside it; before, the run's configuration names the vocabulary."""
    if (workdir / MODEL).is_dir():
        return companions(workdir / MODEL)
    found = _run_config(workdir)
    named = found.get("data", found)  # a run of gqa.ppo has no such section
    named = named.get("vocabulary") if isinstance(named, dict) else None
    if not isinstance(named, str):
        return []
    path = Path(named)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if path.name == _TOKENIZERS[0]:
        files.append(path.with_name(_TOKENIZERS[1]))
    # A tokenizer's files only: a copy must not take the place of the new checkpoint's own files.
    return [file for file in files if file.is_file() and (file.suffix == ".model" or file.name in _TOKENIZERS)]


def _run_config(workdir: Path) -> dict:
    return hf_config.read_json(workdir / CONFIG) if (workdir / CONFIG).is_file() else {}
