"""NF4 with double quantisation (QLoRA, Dettmers et al. 2023, §3): 16 values where a normal distribution has its mass.

As bitsandbytes stores it: a block of 64 inputs of an output has the largest of their magnitudes as its scale; these
scales, without their mean, are in 8 bits themselves, with one float32 for every 256. That is 4.127 bits a weight.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqa.errors import InputError
from gqa.nn.quantized import QuantizedKernel, axes_of_matrix, sides

BLOCK = 64  # inputs that share a scale; the largest part of it that divides them, where it does not
SCALES_BLOCK = 256  # scales that share a scale

# QLoRA appendix E.
CODE_BOOK = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip


def dynamic_code_book() -> np.ndarray:
    """The 256 values of bitsandbytes' signed dynamic data type, ascending (Dettmers et al. 2022, 8-bit optimizers).

    Seven decades below 1, of which each has twice the values of the one below it.
    """
    magnitudes = []
    for exponent in range(7):
        bounds = np.linspace(0.1, 1.0, 2**exponent + 1, dtype=np.float32)
        magnitudes.append(10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2).astype(np.float64))
    found = np.concatenate(magnitudes)
    return np.sort(np.concatenate([found, -found, [0.0, 1.0]])).astype(np.float32)


SCALES_CODE_BOOK = dynamic_code_book()


class NF4Kernel(QuantizedKernel):
    """A kernel `[(L,) in…, out…]` as places in `CODE_BOOK`, two in a byte.

    `integers` is uint8 `[(L,) out, in / 2]`, the first of two neighbours in the high four bits; `scale` uint8
    `[(L,) out, in / 64]`, places in `SCALES_CODE_BOOK`; `scale_of_scales` float32 `[(L,) ⌈out · in / 64 / 256⌉]` and
    `mean_scale` float32 `[(L,)]`.
    """

    def __init__(self, kernel: jax.Array, num_inputs: int, axes: tuple[str, ...]):
        """Arguments as of `QuantizedKernel`. Raises `InputError` for an odd number of inputs."""
        self.axes = axes
        stacked, self.input_shape, self.output_shape = sides(kernel.shape, num_inputs, axes)
        width = math.prod(self.input_shape)
        if width % 2:
            raise InputError(f"nf4 packs two inputs in a byte, a kernel has {width}; expected an even number, or int8")
        integers, scale, scale_of_scales, mean_scale = _quantize(kernel, len(stacked), num_inputs)
        matrix_axes = axes_of_matrix(axes, num_inputs)
        self.integers = nnx.Param(integers, axes=matrix_axes)
        self.scale = nnx.Param(scale, axes=matrix_axes)
        self.scale_of_scales = nnx.Param(scale_of_scales, axes=(None,))
        self.mean_scale = nnx.Param(mean_scale, axes=())

    def matrix(self, dtype) -> jax.Array:
        """The values `[(L,) out, in]`."""
        return self._values(self.integers[...], self._scales(), dtype)

    def rows(self, indices: jax.Array, dtype) -> jax.Array:
        """Rows of an embedding, whose outputs are the vocabulary: `[…, in]` of `indices` `[…]`."""
        return self._values(self.integers[...][indices], self._scales()[indices], dtype)

    def times(self, x_RI: jax.Array) -> jax.Array:
        """What `product` computes, for it alone to call."""
        return x_RI @ self.matrix(x_RI.dtype).T

    def _scales(self) -> jax.Array:
        """Float32 `[(L,) out, in / 64]`."""
        shape = self.scale.shape
        block = jnp.arange(math.prod(shape[-2:])).reshape(shape[-2:]) // SCALES_BLOCK
        centred = _looked_up(SCALES_CODE_BOOK, self.scale[...]) * self.scale_of_scales[..., block]
        return centred + self.mean_scale[..., None, None]

    @staticmethod
    def _values(integers, scales, dtype) -> jax.Array:
        pairs = jnp.stack([integers >> 4, integers & 15], axis=-1)
        values = _looked_up(CODE_BOOK, pairs).reshape(*scales.shape, -1) * scales[..., None]
        return values.astype(dtype).reshape(*integers.shape[:-1], -1)


def _looked_up(code_book: np.ndarray, places: jax.Array) -> jax.Array:
    return jnp.asarray(code_book).at[places].get(mode="promise_in_bounds")


def _places(code_book: np.ndarray, values: jax.Array) -> jax.Array:
    """The place of the nearest value."""
    midpoints = (code_book[:-1] + code_book[1:]) / 2
    return jnp.sum(values[..., None] > midpoints, axis=-1, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(kernel: jax.Array, num_stacked: int, num_inputs: int) -> tuple[jax.Array, ...]:
    stacked, shape = kernel.shape[:num_stacked], kernel.shape[num_stacked:]
    width = math.prod(shape[:num_inputs])
    matrix = kernel.astype(jnp.float32).reshape(*stacked, width, -1).swapaxes(-1, -2)
    blocks = matrix.reshape(*matrix.shape[:-1], -1, math.gcd(width, BLOCK))
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    places = _places(CODE_BOOK, blocks / jnp.where(scales == 0, 1, scales)[..., None])
    pairs = places.reshape(*matrix.shape[:-1], -1, 2)
    flat = scales.reshape(*stacked, -1)
    mean = jnp.mean(flat, axis=-1)
    padding = [(0, 0)] * num_stacked + [(0, -flat.shape[-1] % SCALES_BLOCK)]
    centred = jnp.pad(flat - mean[..., None], padding).reshape(*stacked, -1, SCALES_BLOCK)
    largest = jnp.max(jnp.abs(centred), axis=-1)
    places = _places(SCALES_CODE_BOOK, centred / jnp.where(largest == 0, 1, largest)[..., None])
    places = places.reshape(*stacked, -1)[..., : flat.shape[-1]].reshape(scales.shape)
    return pairs[..., 0] << 4 | pairs[..., 1], places, largest, mean
