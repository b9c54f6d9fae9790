"""A model's kernels in few bits, for decoding and as what adapters are trained on."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from gqa.errors import InputError, nearest
from gqa.models import Model
from gqa.models.layer_kernels import axes_of, layer_kernels, num_inputs, with_kernels
from gqa.nn.nf4 import NF4Kernel
from gqa.nn.quantized import QuantizedKernel

# What `quantize` knows -> a function (kernel, inputs, axes) that makes it of a kernel.
WEIGHTS: dict[str, Callable[[jax.Array, int, tuple[str, ...]], QuantizedKernel]] = {
    "int8": partial(QuantizedKernel, bits=8),
    "int4": partial(QuantizedKernel, bits=4),
    "nf4": NF4Kernel,
}

# Names of kernels wherever they are in a model -> how many of their leading axes are summed over.
KERNELS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "logits": 1}


def check_weights(name: str) -> None:
    """Raises `InputError` unless `name` is one of `WEIGHTS`."""
    if name not in WEIGHTS:
        expected, near = ", ".join(WEIGHTS), nearest(name, WEIGHTS)
        raise InputError(f"weights={name!r}; expected {expected}, or none for the model's own; nearest: {near}")


def quantize(model: Model, weights: str) -> Model:
    """The model with a `QuantizedKernel` in place of every kernel, and of the embedding where that is the logits' too.

    Norms, biases, tables of positions and an embedding that is only looked up stay as they are. `weights` is one of
    `WEIGHTS`; raises `InputError` for another.
    """
    check_weights(weights)
    model = jax.tree.map(lambda leaf: leaf, model)
    if model.config.tied_logits:
        # A row is an output of the logits: as a kernel the table is turned.
        axes = model.embedding.get_metadata()["axes"]
        model.embedding = WEIGHTS[weights](model.embedding[...].T, 1, axes[::-1])
    _replace(model, WEIGHTS[weights])
    return model


def quantize_layers(model: Model, weights: str) -> Model:
    """The model with its layers' kernels in few bits: QLoRA's base, whose embedding and logits stay as they are.

    `weights` is one of `WEIGHTS`; raises `InputError` for another.
    """
    check_weights(weights)
    found = {path: quantized(kernel[...], kernel, weights) for path, kernel in layer_kernels(model)}
    return with_kernels(model, found)


def quantized(value: jax.Array, like, weights: str) -> QuantizedKernel:
    """`value` in few bits, of all layers of a stack or of one; `like` is a kernel with the same axes."""
    return WEIGHTS[weights](value, num_inputs(like), axes_of(like))


def dequantize_layers(model: Model) -> Model:
    """The model with its layers' kernels in the parameters' dtype again, the values those that they have in few bits.

    A model without kernels in few bits is returned as it is.
    """
    found = {
        path: nnx.Param(kernel.kernel(model.config.param_dtype), axes=kernel.axes)
        for path, kernel in layer_kernels(model)
        if isinstance(kernel, QuantizedKernel)
    }
    return with_kernels(model, found) if found else model


def _replace(module: nnx.Module, make: Callable) -> None:
    for name in list(vars(module)):  # not its values: a kernel is freed as soon as it is replaced
        value = getattr(module, name)
        if isinstance(value, nnx.Param) and name in KERNELS:
            setattr(module, name, make(value[...], KERNELS[name], value.get_metadata()["axes"]))
        elif isinstance(value, nnx.List):
            for part in value:
                _replace(part, make)
        elif isinstance(value, nnx.Module) and not isinstance(value, QuantizedKernel):
            _replace(value, make)
