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
        """Writes `T` new positions from `index` (scalar int32) on."""
        start = (0, 0, index, 0)
        return KVCache(
            jax.lax.dynamic_update_slice(self.key, key_BKTd.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(self.value, value_BKTd.astype(self.value.dtype), start),
        )
