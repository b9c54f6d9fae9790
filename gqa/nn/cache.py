"""The key/value cache of one attention site."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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


def _write(cache_BKSd, new_BKTd, index) -> jax.Array:
    # Row by row even where all rows have one index: XLA:CPU writes this in place inside a loop, but copies the cache
    # several times a step for a single slice of all rows.
    index_B = jnp.broadcast_to(index, cache_BKSd.shape[:1])
    write_row = lambda cache, new, index: jax.lax.dynamic_update_slice(cache, new, (0, index, 0))  # noqa: E731
    return jax.vmap(write_row)(cache_BKSd, new_BKTd.astype(cache_BKSd.dtype), index_B)
