"""LoRA (Hu et al. 2021): kernels that stay as they are, each with a trained product of two thin ones beside it.

The kernels may be in few bits: in NF4 that is QLoRA (Dettmers et al. 2023).

Adapters are a pytree of their own: `{"decoder.0.self_attention.query": {"down": …, "up": …}}`, the number being that
of the stack. What is trained, saved and given an optimizer is that dictionary; the model beside it is frozen. `attach`
puts the two together for a forward pass, `merge` for good.

    down [L, in…, r]     up [L, r, out…]     y = x W + scale · (dropout(x) down) up
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqa.errors import InputError
from gqa.models import Model
from gqa.models.layer_kernels import axes_of, layer_kernels, layer_numbers, layer_path, num_inputs, with_kernels
from gqa.models.quantize import WEIGHTS, dequantize_layers
from gqa.nn.layers import Dropout, linear

Adapters = dict[str, dict[str, nnx.Param]]
ByLayer = dict[str, tuple[np.ndarray, np.ndarray]]  # path of a layer's kernel -> its down [in…, r] and up [r, out…]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which kernels are adapted, and how."""

    kernels: tuple[str, ...]  # patterns such as self_attention.query, self_attention.*, mlp.*, or * for all
    rank: int  # r; h2oGPT: 8
    alpha: float  # the product counts alpha / r (with rank_stabilised alpha / sqrt(r)) times
    dropout_rate: float  # on what the adapters read; h2oGPT: 0.05
    rank_stabilised: bool  # rsLoRA (Kalajdzievski 2023)
    base: str | None = None  # the layers' kernels in nf4 (QLoRA), int8 or int4 while adapters train; None: as they are

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"adapter.rank={self.rank}; expected at least 1, such as 8")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"adapter.alpha={self.alpha}; expected a number above 0, such as {2 * self.rank}")
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"adapter.dropout_rate={self.dropout_rate}; expected [0, 1), such as 0.05")
        if not self.kernels:
            raise InputError("adapter.kernels is empty; expected patterns such as self_attention.*")
        if self.base is not None and self.base not in WEIGHTS:
            raise InputError(f"adapter.base={self.base!r}; expected None or one of {', '.join(WEIGHTS)}")

    @property
    def scale(self) -> float:
        """Factor on the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LoRAKernel(nnx.Module):
    """A kernel of any kind with an adapter: stands where the kernel stood.

    A kernel is a parameter with logical axes, or a module with `shape`, `axes` and an `einsum` of its own.
    """

    def __init__(
        self, base: Any, down: jax.Array, up: jax.Array, scale: float, rate: float, dropout_key: jax.Array | None
    ):
        self.base = base
        self.down, self.up = down, up
        self.scale, self.rate = scale, rate
        # Raw, one of each layer: a stack of layers can be sliced. A bare array under trace would count as static.
        self.dropout_key = None if dropout_key is None else nnx.Variable(dropout_key)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return self.base.shape

    def einsum(self, equation: str, x: jax.Array, dtype) -> jax.Array:
        """`einsum` of `x` with kernel and adapter; arguments as of `gqa.nn.layers.linear`."""
        if self._is_cheaper_summed(x, dtype):
            return _summed(equation, self.scale, x, self.base[...], self.down[...], self.up[...])
        read = x
        if self.dropout_key is not None:
            # A mask for all positions: of what an attention read, over heads and their width as one.
            flat = x.reshape(*x.shape[: x.ndim - (self.down.ndim - 1)], -1)
            read = Dropout(self.rate, jax.random.wrap_key_data(self.dropout_key[...]))(flat, 0).reshape(x.shape)
        return linear(equation, x, self.base, dtype) + _added(equation, self.scale, read, self.down, self.up, dtype)

    def _is_cheaper_summed(self, x: jax.Array, dtype) -> bool:
        """Of many rows the sum of the kernels is less work than that of the products.

        In float32 alone: of bfloat16 kernels the sum would lose what adapters learn.
        """
        if self.dropout_key is not None or not isinstance(self.base, nnx.Variable):
            return False
        width = math.prod(self.down.shape[:-1])
        return jnp.dtype(dtype) == self.base.dtype == jnp.float32 and x.size > width * width


def _added(equation: str, scale: float, x: jax.Array, down, up, dtype) -> jax.Array:
    """The adapter's own product."""
    inputs, result = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    n = sum(axis in of_x for axis in of_kernel)
    thin = f"{of_x[:-n]}R"
    hidden = linear(f"{of_x},{of_kernel[:n]}R->{thin}", x, down, dtype)
    # The factor is on the thin product: on the wide one it would be a pass over the gradient, too.
    return linear(f"{thin},R{of_kernel[n:]}->{result}", hidden * jnp.asarray(scale, dtype), up, dtype)


def _sum(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """A kernel with its adapter's product, float32; all may be stacked."""
    rank, layers = down.shape[-1], down.shape[: down.ndim + up.ndim - 2 - kernel.ndim]
    product = down.reshape(*layers, -1, rank) @ up.reshape(*layers, rank, -1)
    return kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(equation: str, scale: float, x, kernel, down, up) -> jax.Array:
    return linear(equation, x, _sum(kernel, down, up, scale), jnp.float32)


def _summed_forward(equation, scale, x, kernel, down, up):
    return _summed(equation, scale, x, kernel, down, up), (x, kernel, down, up)


def _summed_backward(equation, scale, kept, gradient):
    # By itself JAX would make the gradient of the sum, as wide as the kernel's, and the adapters' of that one.
    x, kernel, down, up = kept
    of_products = jax.vjp(lambda *both: linear(equation, *both, jnp.float32), x, _sum(kernel, down, up, scale))[1]
    of_adapter = jax.vjp(lambda *both: _added(equation, scale, x, *both, jnp.float32), down, up)[1]
    return (*of_products(gradient), *of_adapter(gradient))


_summed.defvjp(_summed_forward, _summed_backward)


def create(model: Model, config: LoRAConfig, key: jax.Array) -> Adapters:
    """Fresh adapters for a model (or its abstract form), float32: `up` is zero, so that they change nothing yet.

    Raises `InputError` where a pattern names no kernel.
    """
    found = _chosen(model, config)
    adapters = {}
    for number, (path, kernel) in enumerate(found.items()):
        axes, n = axes_of(kernel), num_inputs(kernel)
        layers, shape = kernel.shape[: len(kernel.shape) - len(axes)], kernel.shape[-len(axes) :]
        bound = math.prod(shape[:n]) ** -0.5  # as PEFT: Kaiming's uniform with a = sqrt(5)
        down_shape = (*layers, *shape[:n], config.rank)
        down = jax.random.uniform(jax.random.fold_in(key, number), down_shape, jnp.float32, -bound, bound)
        up = jnp.zeros((*layers, config.rank, *shape[n:]), jnp.float32)
        adapters[path] = {
            "down": nnx.Param(down, axes=(*axes[:n], "rank")),
            "up": nnx.Param(up, axes=("rank", *axes[n:])),
        }
    return adapters


def abstract(model: Model, config: LoRAConfig) -> Adapters:
    """Shapes, dtypes and logical axes of a model's adapters; nothing is allocated."""
    return jax.eval_shape(lambda: create(model, config, jax.random.key(0)))


def attach(model: Model, adapters: Adapters, config: LoRAConfig, dropout_key: jax.Array | None = None) -> Model:
    """The model with its adapters in place; its arrays are shared, and what is differentiated is up to the caller.

    `dropout_key`: of the adapters' dropout; `None`: none.
    """
    dropped = dropout_key is not None and config.dropout_rate > 0

    def adapted(number: int, path: str, kernel):
        keys = None
        if dropped:
            layers = kernel.shape[: len(kernel.shape) - len(axes_of(kernel))]
            keys = jax.random.key_data(jax.random.split(jax.random.fold_in(dropout_key, number), layers))
        pair = adapters[path]
        return LoRAKernel(kernel, pair["down"], pair["up"], config.scale, config.dropout_rate, keys)

    return with_kernels(
        model, {path: adapted(i, path, kernel) for i, (path, kernel) in enumerate(_of(model, adapters))}
    )


def merge(model: Model, adapters: Adapters, config: LoRAConfig) -> Model:
    """A model without adapters that computes what `attach` would: each kernel with its product added, in its dtype.

    Kernels in few bits become floats, adapted or not.
    """
    model = dequantize_layers(model)

    def merged(path: str, kernel: nnx.Param) -> nnx.Param:
        value = _sum(kernel[...], adapters[path]["down"][...], adapters[path]["up"][...], config.scale)
        return jax.tree.map(lambda leaf: value.astype(leaf.dtype), kernel)

    return with_kernels(model, {path: merged(path, kernel) for path, kernel in _of(model, adapters)})


def by_layer(model: Model, adapters: Adapters) -> ByLayer:
    """Every layer's adapters by the path of its kernel, as checkpoints name it: `decoder.3.self_attention.query`."""
    found = {}
    for path in adapters:
        down, up = (np.asarray(jax.device_get(adapters[path][name][...])) for name in ("down", "up"))
        for number, layer in enumerate(layer_numbers(model, path)):
            found[layer_path(path, layer)] = (down[number], up[number])
    return found


def from_layers(model: Model, config: LoRAConfig, layers: ByLayer) -> Adapters:
    """The inverse of `by_layer`, for the kernels of `config`.

    Raises `InputError` where a layer has none, where there are more, and for shapes that are not the model's.
    """
    like = abstract(model, config)
    rest, adapters = dict(layers), {}
    for path in like:
        names = [layer_path(path, layer) for layer in layer_numbers(model, path)]
        for name in names:
            if name not in rest:
                raise InputError(f"the adapter has nothing for {name}; expected one of every layer")
        pairs = [rest.pop(name) for name in names]
        expected = like[path]
        adapters[path] = {}
        for side, arrays in zip(("down", "up"), zip(*pairs, strict=True), strict=True):
            if arrays[0].shape != expected[side].shape[1:]:
                raise InputError(
                    f"the adapter is of another model: {names[0]} has {side} {list(arrays[0].shape)}, "
                    f"expected {list(expected[side].shape[1:])}"
                )
            value = jnp.asarray(np.stack(arrays), jnp.float32)
            adapters[path][side] = jax.tree.map(lambda _, value=value: value, expected[side])
    if rest:
        raise InputError(f"the adapter has {sorted(rest)[0]}, which the model or its patterns lack")
    return adapters


def num_trainable(model: Model, config: LoRAConfig) -> int:
    """Parameters that are trained, by shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(model, config)))


def _name(path: str) -> str:
    return path.split(".", 2)[2]


def _chosen(model: Model, config: LoRAConfig) -> dict[str, Any]:
    kernels = dict(layer_kernels(model))
    names = sorted({_name(path) for path in kernels})
    for pattern in config.kernels:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"adapter.kernels: {pattern!r} names no kernel; expected some of {', '.join(names)}")
    return {
        path: kernel
        for path, kernel in kernels.items()
        if any(fnmatch.fnmatchcase(_name(path), pattern) for pattern in config.kernels)
    }


def _of(model: Model, adapters: Mapping) -> list[tuple[str, Any]]:
    found = [(path, kernel) for path, kernel in layer_kernels(model) if path in adapters]
    assert len(found) == len(adapters), "adapters of another model"
    return found
