"""What the tables of all checkpoint formats are made of: name of a tensor -> our parameter, transform."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from gqa import models
from gqa.models import stacks


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a tensor of theirs becomes one of ours; on both ways a view wherever numpy has one."""

    layout: str  # same, flat (heads and width one axis), or a matrix: out_in (torch's linear maps), in_out (Flax's)
    input_axes: int  # of a matrix: leading axes of ours that are summed over
    factor: float = 1  # on the values, when read
    interleaved: bool = False  # rotary pairs lie next to each other (Meta's Llama); ours are d/2 apart

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor for one of ours of `shape`."""
        if self.layout == "same":
            return tuple(shape)
        if self.layout == "flat":
            return (math.prod(shape),)
        sides = math.prod(shape[: self.input_axes]), math.prod(shape[self.input_axes :])
        return sides if self.layout == "in_out" else sides[::-1]

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their tensor as ours, of `shape`."""
        if self.factor != 1:
            tensor = tensor.astype(np.float32) * np.float32(self.factor)
        array = (tensor.T if self.layout == "out_in" else tensor).reshape(shape)
        if self.interleaved:
            array = array.reshape(*shape[:-1], shape[-1] // 2, 2).swapaxes(-1, -2).reshape(shape)
        return array

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array as theirs; the factor is not undone: what is written needs none."""
        assert not self.interleaved, "Meta's format is read only"
        shape = self.their_shape(array.shape)
        return array.reshape(shape[::-1]).T if self.layout == "out_in" else array.reshape(shape)


SAME = Transform("same", 0)
FLAT = Transform("flat", 0)
LINEAR = Transform("out_in", 1)
FROM_HEADS = Transform("out_in", 2)  # attention's output, ours [H, d, D]


class Row(NamedTuple):
    """One row of a table: where a tensor of theirs goes."""

    path: str  # of our parameter, with the number of its layer: `decoder.3.self_attention.query`
    transform: Transform


class Parameter(NamedTuple):
    """One array of a model: a parameter of one layer after another, or one without layers."""

    paths: list[str]  # as in a table, one per layer
    layer_shape: tuple[int, ...]
    array: jax.Array | jax.ShapeDtypeStruct

    @property
    def stacked(self) -> bool:
        """Whether the array has a leading axis of layers."""
        return len(self.layer_shape) < len(self.array.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.array.size * self.array.dtype.itemsize

    def assemble(self, placement: jax.sharding.Sharding, read: Callable[[str], np.ndarray]) -> jax.Array:
        """The array made of `read(path)` of every layer, each read once; a process keeps only what it holds."""
        shape = self.array.shape

        def bounds(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
            return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

        indices = {bounds(index) for index in placement.addressable_devices_indices_map(shape).values()}
        shards = {index: np.empty([stop - start for start, stop in index], self.array.dtype) for index in indices}
        for number, path in enumerate(self.paths):
            tensor = read(path)
            for index, shard in shards.items():
                first, last = index[0] if self.stacked else (0, 1)
                within = tuple(slice(*pair) for pair in (index[1:] if self.stacked else index))
                if first <= number < last:
                    (shard[number - first] if self.stacked else shard)[...] = tensor[within]
        return jax.make_array_from_callback(shape, placement, lambda index: shards[bounds(index)])


def parameters(model: models.Model) -> list[Parameter]:
    """All parameters of a model (or of its abstract form, or its gradients) in the order of its leaves."""
    found = []
    for key_path, array in jax.tree_util.tree_leaves_with_path(model):
        names = jax.tree_util.keystr(key_path, simple=True, separator=".").removesuffix(".value").split(".")
        if names[0] in ("encoder", "decoder"):
            side, stack, *rest = names
            first = sum(stacks.num_layers(earlier) for earlier in getattr(model, side)[: int(stack)])
            paths = [".".join([side, str(first + i), *rest]) for i in range(array.shape[0])]
            found.append(Parameter(paths, array.shape[1:], array))
        else:
            found.append(Parameter([".".join(names)], array.shape, array))
    return found
