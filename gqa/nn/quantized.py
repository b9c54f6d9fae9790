"""Kernels in 8 or 4 bits, for decoding and as what adapters stand on: integers, and scales of outputs or of groups.

A `QuantizedKernel` stands in a module where a kernel stood; `gqa.nn.layers.linear` multiplies with either. Another
format of few bits is a subclass with a `matrix` and a `rows` of its own, such as `gqa.nn.nf4`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from gqa.errors import InputError
from gqa.nn.backend import backend
from gqa.nn.matrices import einsum_of_matrices

GROUP = 64  # inputs that share a scale in int4: 4.5 bits a weight with float32 scales
LARGEST = {8: 127, 4: 7}  # symmetric: zero stays zero, and the error is at most half a scale


class QuantizedKernel(nnx.Module):
    """A kernel `[(L,) in…, out…]` as integers `[(L,) out, in]` and float32 scales `[(L,) out, groups]`.

    int8 has one scale for an output channel; int4 one for every `GROUP` inputs of it (the largest part of 64 that
    divides them), and two values in a byte: the first half of the inputs in the low four bits, the second half in the
    high ones, so that both unpack into contiguous rows. `jnp.int4` would not save memory: XLA:CPU gives each a byte.
    """

    def __init__(self, kernel: jax.Array, num_inputs: int, axes: tuple[str, ...], bits: int):
        """Quantises `kernel`, whose first `num_inputs` dimensions are summed over; `axes` are its logical axes.

        A kernel of one dimension more than `axes` is stacked. Raises `InputError` where int4 finds an odd number of
        inputs.
        """
        self.axes = axes
        stacked, self.input_shape, self.output_shape = sides(kernel.shape, num_inputs, axes)
        self.bits = bits
        width = math.prod(self.input_shape)
        if bits == 4 and width % 2:
            raise InputError(f"int4 packs two inputs in a byte, a kernel has {width}; expected an even number, or int8")
        integers, scale = _integers_and_scale(kernel, len(stacked), num_inputs, bits)
        matrix_axes = axes_of_matrix(axes, num_inputs)
        self.integers = nnx.Param(integers, axes=matrix_axes)
        self.scale = nnx.Param(scale, axes=matrix_axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel that it stands for."""
        return self.integers.shape[:-2] + self.input_shape + self.output_shape

    def matrix(self, dtype) -> jax.Array:
        """The values `[(L,) out, in]`."""
        return self._scaled(self.integers[...], self.scale[...], dtype)

    def kernel(self, dtype) -> jax.Array:
        """The values in the shape that the kernel had."""
        return self.matrix(dtype).swapaxes(-1, -2).reshape(self.shape)

    def rows(self, indices: jax.Array, dtype) -> jax.Array:
        """Rows of an embedding, whose outputs are the vocabulary: `[…, in]` of `indices` `[…]`."""
        return self._scaled(self.integers[...][indices], self.scale[...][indices], dtype)

    def einsum(self, equation: str, x: jax.Array, dtype) -> jax.Array:
        """`einsum` of `x` with the kernel; arguments as of `gqa.nn.layers.linear`."""
        return einsum_of_matrices(equation, x.astype(dtype), self.shape, self.product)

    def product(self, x_RI: jax.Array) -> jax.Array:
        """`[R, out]`: `R` rows of inputs times the kernel, in their dtype; the kernel itself has no gradient."""
        return _product_with_frozen(x_RI, self)

    def times(self, x_RI: jax.Array) -> jax.Array:
        """What `product` computes, for it alone to call."""
        if self.bits == 4:
            return _product(x_RI, self.matrix(x_RI.dtype))
        # The scale of a whole channel is left out of the sum.
        return _product(x_RI, self.integers[...].astype(x_RI.dtype)) * self.scale[..., 0].astype(x_RI.dtype)

    def _scaled(self, integers, scale, dtype) -> jax.Array:
        if self.bits == 4:  # shifts of int8 keep the sign
            integers = jnp.concatenate([(integers << 4) >> 4, integers >> 4], axis=-1)
        grouped = integers.reshape(*scale.shape, -1).astype(dtype) * scale[..., None].astype(dtype)
        return grouped.reshape(integers.shape)


def sides(shape: tuple[int, ...], num_inputs: int, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Of a kernel's shape: the layers that it is stacked over, inputs and outputs."""
    first = len(shape) - len(axes)
    return shape[:first], shape[first : first + num_inputs], shape[first + num_inputs :]


def axes_of_matrix(axes: tuple[str, ...], num_inputs: int) -> tuple[str, str]:
    """Logical axes of a kernel's matrix `[out, in]`: it is cut over devices as the kernel is."""
    return axes[num_inputs], axes[0]


@jax.custom_vjp
def _product_with_frozen(x_RI: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    # The barrier ties them to the inputs: what does not change in a loop XLA would compute before it, which is to
    # decode from floats after all, and to keep both.
    x_RI, kernel = jax.lax.optimization_barrier((x_RI, kernel))
    return kernel.times(x_RI)


def _forward(x_RI, kernel):
    # By itself JAX would keep the floats of every layer for the backward pass: it gets the few bits, and makes floats
    # of them once more.
    return _product_with_frozen(x_RI, kernel), kernel


def _backward(kernel, gradient_RO):
    gradient_RO, kernel = jax.lax.optimization_barrier((gradient_RO, kernel))
    return gradient_RO @ kernel.matrix(gradient_RO.dtype), None


_product_with_frozen.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _integers_and_scale(kernel, num_stacked: int, num_inputs: int, bits: int) -> tuple[jax.Array, jax.Array]:
    stacked, shape = kernel.shape[:num_stacked], kernel.shape[num_stacked:]
    width = math.prod(shape[:num_inputs])
    flat = kernel.astype(jnp.float32).reshape(*stacked, width, -1).swapaxes(-1, -2)
    grouped = flat.reshape(*flat.shape[:-1], -1, math.gcd(width, GROUP) if bits == 4 else width)
    scale = jnp.max(jnp.abs(grouped), axis=-1) / LARGEST[bits]
    integers = jnp.round(grouped / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8).reshape(flat.shape)
    if bits == 4:
        low, high = jnp.split(integers, 2, axis=-1)
        integers = (low & 15) | (high << 4)
    return integers, scale


def _product(x_RI: jax.Array, matrix_OI: jax.Array) -> jax.Array:
    R, width = x_RI.shape
    if backend() != "cpu" or R > 32 or (R == 1 and width < 4096):
        return x_RI @ matrix_OI.T
    # XLA:CPU fuses the conversion into a product with a vector of less than 16 KB (int8, 4096 x 1024: 0.2 ms, float32
    # 1.1 ms), but would write out the floats before any other; into a sum of products of at least two rows it fuses
    # (4096 x 4096, 2 rows: 2.6 ms, after writing 15 ms, float32 4 ms).
    x_RI = x_RI if R > 1 else jnp.concatenate([x_RI, x_RI])
    return jnp.sum(x_RI[:, None, :] * matrix_OI, axis=-1)[:R]
