"""Checkpoints of any format: recognised by what is in the folder, checked from headers, loaded onto devices.

A format is a module with `recognises(directory)` and `read(directory, run_choices) -> Contents`; a row in `FORMATS`
adds one.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from tqdm import tqdm

from gqa import models, sharding
from gqa.checkpoints import hf, meta, t5x, training_run
from gqa.checkpoints.source import Contents, companions, some
from gqa.checkpoints.table import parameters
from gqa.checkpoints.tensor import DTYPES
from gqa.errors import InputError

FORMATS: dict[str, ModuleType] = {"Hugging Face": hf, "T5X": t5x, "Meta's Llama": meta, "training run": training_run}


def read(directory: str | os.PathLike, **run_choices) -> Contents:
    """What the checkpoint in `directory` holds, from headers alone: every parameter is there, of the right shape.

    Args:
      directory: a folder of one of `FORMATS`.
      run_choices: what a checkpoint does not determine: `dtype`, `param_dtype`, `scan_layers`, `remat` and
        `dropout_rate` of the model's configuration.

    Raises `InputError` for a folder that is not there, of no known format, damaged or contradicting itself.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; expected a checkpoint's")
    contents = FORMATS[format_of(directory)].read(directory, run_choices)
    for parameter in parameters(models.abstract(contents.config)):
        for path in parameter.paths:
            tensor, transform = contents.tensors[path]
            expected = transform.their_shape(parameter.layer_shape)
            if tensor.shape != expected:
                raise InputError(
                    f"{tensor.name} in {directory} has shape {list(tensor.shape)}; "
                    f"expected {list(expected)} by the model's sizes"
                )
            if tensor.dtype not in DTYPES:
                names = ", ".join(sorted(dtype.name for dtype in DTYPES))
                raise InputError(f"{tensor.name} in {directory} has type {tensor.dtype}; expected one of {names}")
    if contents.companions is None:
        contents = contents._replace(companions=companions(directory))
    return contents


def format_of(directory: Path) -> str:
    """The name of the format of the checkpoint in `directory`, in `FORMATS`."""
    for name, module in FORMATS.items():
        if module.recognises(directory):
            return name
    found = some(sorted(path.name for path in directory.iterdir())) or "nothing"
    raise InputError(f"{directory} is no checkpoint of a known format ({', '.join(FORMATS)}); found {found}")


def read_config(directory: str | os.PathLike, **run_choices) -> models.ModelConfig:
    """The architecture of the checkpoint in `directory`; arguments and errors as of `read`."""
    return read(directory, **run_choices).config


def load(directory: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, **run_choices) -> models.Model:
    """The model in `directory`, its parameters in `param_dtype`, each created where it belongs.

    Args:
      directory: a folder of one of `FORMATS`.
      mesh: parameters are sharded over it by `gqa.sharding`; `None`: the default device.
      run_choices: the keywords of `read`.

    Raises `InputError`, before anything is allocated, for what `read` refuses.
    """
    contents = read(directory, **run_choices)
    abstract = models.abstract(contents.config)
    ours = parameters(abstract)
    if mesh is None:
        placements = [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(ours)
    else:
        placements = jax.tree.leaves(sharding.parameter_shardings(mesh, abstract))
    arrays = []
    total = sum(parameter.nbytes for parameter in ours)
    with tqdm(total=total, desc="load", unit="B", unit_scale=True, delay=1) as bar:
        for parameter, placement in zip(ours, placements, strict=True):
            read_layer = partial(read_parameter, contents.tensors, shape=parameter.layer_shape)
            arrays.append(parameter.assemble(placement, read_layer))
            bar.update(parameter.nbytes)
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def read_parameter(tensors: Mapping, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter of one layer in our layout, read now: a view of what was read wherever numpy has one."""
    tensor, transform = tensors[path]
    return transform.to_ours(tensor.read(), shape)
