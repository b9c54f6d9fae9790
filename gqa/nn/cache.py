"""The key/value cache of one attention site, in the compute dtype or in int8."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from gqa.errors import InputError
from gqa.nn.backend import backend
from gqa.sharding import constrain


class KVCache(NamedTuple):
    """Keys and values `[B, K, S, d]` of up to `S` positions; stacked layers put `L` in front."""

    key: jax.Array
    value: jax.Array

    @classmethod
    def zeros(cls, *shape: int, dtype) -> "KVCache":
        """An empty cache of shape `[(L,) B, K, S, d]`."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def append(self, key_BKTd: jax.Array, value_BKTd: jax.Array, index: jax.Array) -> "KVCache":
        """Writes `T` new positions from `index` on: an int32 scalar, or `[B]` where each row has its own."""
        return KVCache(_write(self.key, key_BKTd, index), _write(self.value, value_BKTd, index))

    def read(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, K, S, d]`; `dtype` is theirs where the cache has none of its own."""
        return self.key, self.value


class Int8KVCache(NamedTuple):
    """Keys and values `[B, K, S, d]` in int8, each head's at each position with a scale of its own.

    A value is off by at most 1/254 of the largest of its head and position.
    """

    key: jax.Array
    key_scale: jax.Array  # float32 [B, K, S, 1]
    value: jax.Array
    value_scale: jax.Array

    @classmethod
    def zeros(cls, *shape: int) -> "Int8KVCache":
        """An empty cache of shape `[(L,) B, K, S, d]`."""
        values, scales = jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32)
        return cls(values, scales, values, scales)

    @classmethod
    def of(cls, key: jax.Array, value: jax.Array) -> "Int8KVCache":
        """The cache of given keys and values."""
        return cls(*_quantize(key), *_quantize(value))

    def append(self, key_BKTd: jax.Array, value_BKTd: jax.Array, index: jax.Array) -> "Int8KVCache":
        """As of `KVCache`."""
        new = Int8KVCache.of(key_BKTd, value_BKTd)
        return Int8KVCache(*(_write(old, part, index) for old, part in zip(self, new, strict=True)))

    def read(self, dtype) -> tuple[jax.Array, jax.Array]:
        """As of `KVCache`."""
        return (
            (self.key * self.key_scale).astype(dtype),
            (self.value * self.value_scale).astype(dtype),
        )


Cache = KVCache | Int8KVCache


def check_cache_dtype(name: str | None) -> None:
    """Raises `InputError` unless `name` is a quantised cache's type, int8, or `None` for the model's own."""
    if name not in (None, "int8"):
        raise InputError(f"cache type {name!r} is unknown; expected int8, or none for the model's own")


def empty_cache(*shape: int, dtype) -> Cache:
    """An empty cache of shape `[(L,) B, K, S, d]`, quantised if `dtype` is int8."""
    cache = Int8KVCache.zeros(*shape) if jnp.dtype(dtype) == jnp.int8 else KVCache.zeros(*shape, dtype=dtype)
    return _placed(cache)


def filled_cache(key: jax.Array, value: jax.Array, dtype) -> Cache:
    """The cache of given keys and values, quantised if `dtype` is int8."""
    if jnp.dtype(dtype) == jnp.int8:
        return _placed(Int8KVCache.of(key, value))
    return _placed(KVCache(key.astype(dtype), value.astype(dtype)))


def row_major(caches):
    """Caches with one head, on one CPU, laid out in the order of their axes; all others as they are.

    Left to itself, XLA:CPU carries a cache of one head through a loop in another order of axes, and copies all of it
    twice in every step.
    """
    if backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return caches

    def lay_out(leaf):
        return with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim)))) if leaf.shape[-3] == 1 else leaf

    return jax.tree.map(lay_out, caches)


def _placed(cache: Cache) -> Cache:
    """Rows over the batch's mesh axes, heads over theirs; every position where its row and head are."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", "kv_heads", "kv_length", "head_dim"), cache)


def _quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def _write(cache_BKSd, new_BKTd, index) -> jax.Array:
    # Row by row even where all rows have one index: XLA:CPU writes this in place inside a loop, but copies the cache
    # several times a step for a single slice of all rows.
    index_B = jnp.broadcast_to(index, cache_BKSd.shape[:1])
    write_row = lambda cache, new, index: jax.lax.dynamic_update_slice(cache, new, (0, index, 0))  # noqa: E731
    return jax.vmap(write_row)(cache_BKSd, new_BKTd.astype(cache_BKSd.dtype), index_B)
