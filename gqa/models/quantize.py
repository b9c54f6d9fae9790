"""A model's kernels in few bits, for decoding."""

import jax
from flax import nnx

from gqa.command_line import nearest
from gqa.errors import InputError
from gqa.models import Model
from gqa.nn.quantized import QuantizedKernel

WEIGHTS = {"int8": 8, "int4": 4}  # what `quantize` knows -> bits

# Names of kernels wherever they are in a model -> how many of their leading axes are summed over.
KERNELS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "logits": 1}


def check_weights(name: str) -> None:
    """Raises `InputError` unless `name` is one of `WEIGHTS`."""
    if name not in WEIGHTS:
        expected, near = " or ".join(WEIGHTS), nearest(name, WEIGHTS)
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
        model.embedding = QuantizedKernel(model.embedding[...].T, 1, axes[::-1], WEIGHTS[weights])
    _replace(model, WEIGHTS[weights])
    return model


def _replace(module: nnx.Module, bits: int) -> None:
    for name in list(vars(module)):  # not its values: a kernel is freed as soon as it is replaced
        value = getattr(module, name)
        if isinstance(value, nnx.Param) and name in KERNELS:
            kernel = QuantizedKernel(value[...], KERNELS[name], value.get_metadata()["axes"], bits)
            setattr(module, name, kernel)
        elif isinstance(value, nnx.List):
            for part in value:
                _replace(part, bits)
        elif isinstance(value, nnx.Module) and not isinstance(value, QuantizedKernel):
            _replace(value, bits)
