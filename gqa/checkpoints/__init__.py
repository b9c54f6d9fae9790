"""Checkpoints of any format: recognised by what is in the folder, checked from headers, loaded onto devices.

A format is a module with `recognises(directory)` and `read(directory, run_choices) -> Contents`; a row in `FORMATS`
adds one.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gqa import models, sharding
from gqa.checkpoints import hf, meta, t5x, training_run
from gqa.checkpoints.source import Contents, companions, some
from gqa.checkpoints.table import Parameter, parameters
from gqa.checkpoints.tensor import DTYPES
from gqa.errors import InputError
from gqa.models.layer_kernels import axes_of, layer_kernels, with_kernels
from gqa.models.quantize import check_weights, quantized

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


def load(
    directory: str | os.PathLike,
    *,
    mesh: jax.sharding.Mesh | None = None,
    weights: str | None = None,
    **run_choices,
) -> models.Model:
    """The model in `directory`, its parameters in `param_dtype`, each created where it belongs.

    Args:
      directory: a folder of one of `FORMATS`.
      mesh: parameters are sharded over it by `gqa.sharding`; `None`: the default device.
      weights: the layers' kernels in few bits, a name of `gqa.models.quantize.WEIGHTS`, made of what the checkpoint
        holds, whatever `param_dtype`, a layer at a time: the devices never hold more floats than one layer's kernel.
      run_choices: the keywords of `read`.

    Raises `InputError`, before anything is allocated, for what `read` refuses and for unknown `weights`.
    """
    if weights is not None:
        check_weights(weights)
    contents = read(directory, **run_choices)
    abstract = models.abstract(contents.config)
    ours = parameters(abstract)
    if mesh is None:
        placements = [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(ours)
    else:
        placements = jax.tree.leaves(sharding.parameter_shardings(mesh, abstract))
    kernels = {} if weights is None else dict(layer_kernels(abstract))
    arrays, in_few_bits = [], {}
    total = sum(parameter.nbytes for parameter in ours)
    with tqdm(total=total, desc="load", unit="B", unit_scale=True, delay=1) as bar:
        for (key_path, _), parameter, placement in zip(
            jax.tree_util.tree_leaves_with_path(abstract), ours, placements, strict=True
        ):
            path = jax.tree_util.keystr(key_path, simple=True, separator=".").removesuffix(".value")
            read_layer = partial(read_parameter, contents.tensors, shape=parameter.layer_shape)
            if path in kernels:
                in_few_bits[path] = _quantized(parameter, read_layer, kernels[path], weights, mesh)
                arrays.append(parameter.array)
            else:
                arrays.append(parameter.assemble(placement, read_layer))
            bar.update(parameter.nbytes)
    model = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
    return with_kernels(model, in_few_bits) if in_few_bits else model


def _quantized(
    parameter: Parameter, read_layer: Callable[[str], np.ndarray], like, weights: str, mesh: jax.sharding.Mesh | None
):
    """A stack's kernel in few bits, quantised layer by layer; `like` is the abstract kernel."""
    where = None
    if mesh is not None:
        spec = sharding.partition_spec(mesh, axes_of(like), parameter.layer_shape)
        where = jax.sharding.NamedSharding(mesh, spec)
    layers = [
        quantized(jax.device_put(read_layer(path).astype(np.float32), where), like, weights) for path in parameter.paths
    ]

    def stacked(layers):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    placed = None if mesh is None else sharding.parameter_shardings(mesh, jax.eval_shape(stacked, layers))
    return jax.jit(stacked, out_shardings=placed)(layers)


def read_parameter(tensors: Mapping, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter of one layer in our layout, read now: a view of what was read wherever numpy has one."""
    tensor, transform = tensors[path]
    return transform.to_ours(tensor.read(), shape)
