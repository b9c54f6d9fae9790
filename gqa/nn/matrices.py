"""Linear maps as products of two matrices."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def einsum_of_matrices(
    equation: str, x: jax.Array, kernel_shape: tuple[int, ...], product: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`einsum` of `x` with a kernel of which only `product` is known: rows of inputs `[R, in]` to rows `[R, out]`.

    The axes summed over are the last of `x` and the first of the kernel.
    """
    inputs, result = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    n = sum(axis in of_x for axis in of_kernel)
    assert of_x[-n:] == of_kernel[:n], equation
    flat = product(x.reshape(-1, math.prod(x.shape[-n:])))
    return jnp.einsum(f"{of_x[:-n]}{of_kernel[n:]}->{result}", flat.reshape(x.shape[:-n] + kernel_shape[n:]))
