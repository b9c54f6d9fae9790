"""The plain layers: parameters, linear maps, RMSNorm, the gated MLP, embeddings and dropout.

Axis legend, everywhere in this library: `B` batch, `T` query positions, `S` key positions, `D` model width, `F` MLP
width, `H` query heads, `K` key/value heads, `G` query heads per key/value head, `d` head width, `L` layers, `V`
vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gqa.nn.backend import backend
from gqa.nn.matrices import einsum_of_matrices
from gqa.nn.quantized import QuantizedKernel
from gqa.sharding import constrain

# Named functions: a lambda held by a module would retrace for every instance.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": jax.nn.gelu,  # tanh approximation, as in T5X and transformers' T5.1.1
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def parameter(
    key: jax.Array | None, shape: tuple[int, ...], axes: tuple[str, ...], stddev: float | None, dtype
) -> nnx.Param:
    """Declares a parameter: shape, logical axes and initialiser.

    The initialiser is normal of `stddev`, ones where it is `None`, zeros where it is 0; only the first needs a key.
    """
    assert len(shape) == len(axes), (shape, axes)
    if stddev is None:
        value = jnp.ones(shape, dtype)
    else:
        value = stddev * jax.random.normal(key, shape, dtype) if stddev else jnp.zeros(shape, dtype)
    return nnx.Param(value, axes=axes)


def linear(equation: str, x: jax.Array, kernel: nnx.Param | nnx.Module | jax.Array, dtype) -> jax.Array:
    """`einsum` of an activation with a kernel, in the compute dtype.

    The axes summed over are the last of `x` and the first of the kernel, as in `BTHd,HdD->BTD`. A kernel may be a
    module with a `shape` and an `einsum` of its own: a quantised or an adapted one.
    """
    if isinstance(kernel, nnx.Module):
        return kernel.einsum(equation, x, dtype)
    x, kernel = x.astype(dtype), kernel[...].astype(dtype)
    if backend() != "cpu":
        return jnp.einsum(equation, x, kernel)
    # XLA:CPU turns the operands of a product of more than two dimensions, its gradient's with all that was fused into
    # them: forward and backward with a GELU at 4096 x 192 x 512, two cores, 39 ms; as matrices 13 ms.
    return einsum_of_matrices(equation, x, kernel.shape, lambda x_RI: x_RI @ kernel.reshape(x_RI.shape[1], -1))


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of one call: the rate and the random key; `None` in its place means no dropout.

    A mask is shared by all positions (of attention's weights: by all queries), as in T5X. On two CPU cores a mask of
    its own for each of 16 x 8 x 256 x 256 weights takes eight times their softmax.
    """

    rate: float  # share of the elements set to zero
    key: jax.Array  # folded with the site's number, so that no two sites share a mask

    def __call__(self, x: jax.Array, site: int) -> jax.Array:
        keep = jax.random.bernoulli(
            jax.random.fold_in(self.key, site), 1.0 - self.rate, (*x.shape[:-2], 1, x.shape[-1])
        )
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)


def dropped(x: jax.Array, dropout: Dropout | None, site: int) -> jax.Array:
    """`x` after `dropout`, or `x` itself where there is none."""
    return x if dropout is None else dropout(x, site)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, in float32 whatever the input (Llama 2 §2.2; T5.1.1 calls it layer norm)."""

    def __init__(self, width: int, epsilon: float, param_dtype, axis: str = "embed"):
        self.scale = parameter(None, (width,), (axis,), None, param_dtype)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """`(act(x W_gate) * (x W_up)) W_down`: T5.1.1's gated GELU and Llama's SwiGLU."""

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str, stddev_in: float, stddev_out: float, param_dtype, key
    ):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = parameter(gate_key, (d_model, d_ff), ("embed", "mlp"), stddev_in, param_dtype)
        self.up = parameter(up_key, (d_model, d_ff), ("embed", "mlp"), stddev_in, param_dtype)
        self.down = parameter(down_key, (d_ff, d_model), ("mlp", "embed"), stddev_out, param_dtype)
        self.activation = activation

    def __call__(self, x_BTD: jax.Array, dropout: Dropout | None, site: int) -> jax.Array:
        gate_BTF = ACTIVATIONS[self.activation](linear("BTD,DF->BTF", x_BTD, self.gate, x_BTD.dtype))
        up_BTF = linear("BTD,DF->BTF", x_BTD, self.up, x_BTD.dtype)
        hidden_BTF = constrain(dropped(gate_BTF * up_BTF, dropout, site), "batch", "length", "mlp")
        return linear("BTF,FD->BTD", hidden_BTF, self.down, x_BTD.dtype)


def embed(table: nnx.Param | QuantizedKernel, tokens_BT: jax.Array, dtype) -> jax.Array:
    """Rows of an embedding table `[V, D]` for `tokens_BT`, in `dtype`."""
    if isinstance(table, QuantizedKernel):
        return table.rows(tokens_BT, dtype)
    # Its width is gathered first, as a kernel's is: looked up in parts, the rows would be replicated on all devices.
    return constrain(table[...], "vocab", "activation")[tokens_BT].astype(dtype)


def unembed(table: nnx.Param | QuantizedKernel, x_BTD: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` float32 by the rows of an embedding table."""
    return logits(x_BTD, table if isinstance(table, QuantizedKernel) else table[...].T)


def logits(x_BTD: jax.Array, kernel: nnx.Param | nnx.Module | jax.Array) -> jax.Array:
    """Logits `[B, T, V]` float32 by a kernel `[D, V]`.

    Summed and kept in float32: rounded to bfloat16, one row in thirty has a tie at the top. Their gradient is taken in
    the dtype of `x`.
    """
    if isinstance(kernel, nnx.Module) or x_BTD.dtype == jnp.float32:
        return linear("BTD,DV->BTV", x_BTD, kernel, x_BTD.dtype).astype(jnp.float32)
    return _float32_product(x_BTD, kernel[...].astype(x_BTD.dtype))


@jax.custom_vjp
def _float32_product(x_BTD, kernel_DV):
    return jnp.einsum("BTD,DV->BTV", x_BTD, kernel_DV, preferred_element_type=jnp.float32)


def _float32_product_forward(x_BTD, kernel_DV):
    return _float32_product(x_BTD, kernel_DV), (x_BTD, kernel_DV)


def _float32_product_backward(arguments, gradient_BTV):
    # Products of float32 with bfloat16 would cost an accelerator several times as much.
    _, gradients = jax.vjp(lambda x, kernel: jnp.einsum("BTD,DV->BTV", x, kernel), *arguments)
    return gradients(gradient_BTV.astype(arguments[0].dtype))


_float32_product.defvjp(_float32_product_forward, _float32_product_backward)
