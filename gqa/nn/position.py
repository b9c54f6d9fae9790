"""Positions: T5's relative position bias and rotary embeddings (RoPE) with Llama 3's frequency scaling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqa.nn.layers import parameter


def relative_position_bucket(
    distance: jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """T5's bucket of `distance = key position - query position`: exact when near, logarithmic up to `max_distance`.

    Source: Raffel et al. 2020 §2.1. Returns int32 of the same shape in `[0, num_buckets)`.
    """
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    max_exact = num_buckets // 2
    # Where each further bucket begins, on the host: a device's logarithm may round to the wrong side of a beginning
    # that is a whole number.
    ratios = (max_distance / max_exact) ** (np.arange(1, num_buckets - max_exact) / (num_buckets - max_exact))
    begins = np.minimum(np.ceil(max_exact * ratios * (1 - 1e-12)), np.iinfo(np.int32).max).astype(np.int32)
    far = max_exact + jnp.sum(distance[..., None] >= begins, axis=-1, dtype=jnp.int32)
    return (bucket + jnp.where(distance < max_exact, distance, far)).astype(jnp.int32)


class RelativePositionBias(nnx.Module):
    """A learnt bias per head and bucketed distance, added to the scores of one layer or of all layers of a stack."""

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int,
        max_distance: int,
        bidirectional: bool,
        stddev: float,
        param_dtype,
        key,
    ):
        self.table = parameter(key, (num_buckets, num_heads), ("buckets", "heads"), stddev, param_dtype)
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def __call__(self, num_queries: int, num_keys: int, offset: jax.Array | int) -> jax.Array:
        """Bias `[H, T, S]` float32 for queries at positions `offset + t` and keys at positions `s`.

        `offset` may be `[B]`, one for each row: `[B, H, T, S]` then.
        """
        if jnp.ndim(offset):
            return jax.vmap(lambda offset: self(num_queries, num_keys, offset))(offset)
        # The bias depends on s - t alone. Laid out by (s - t) mod N with N = T + S, repeating the vector T times and
        # reading rows of length N - 1 shifts each row by one: no gather of T x S entries, no scatter in its gradient.
        period = num_queries + num_keys
        index = jnp.arange(period)
        distance = jnp.where(index < num_keys, index, index - period) - offset
        bucket = relative_position_bucket(
            distance,
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
        )
        bias_HN = self.table[...].astype(jnp.float32).T[:, bucket]
        rows = jnp.tile(bias_HN, (1, num_queries))[:, : num_queries * (period - 1)]
        return rows.reshape(-1, num_queries, period - 1)[:, :, :num_keys]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the low rotary frequencies to longer contexts."""

    factor: float  # how much longer the context becomes
    low_frequency_factor: float  # wavelengths above original / this are stretched by the whole factor
    high_frequency_factor: float  # wavelengths below original / this are left alone
    original_max_position: int  # context the model was pre-trained with, in tokens


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequencies `[d/2]` in radians per position, float32 (RoPE, arXiv 2104.09864 eq. 15; Llama 3 scaling)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    wavelength = 2 * jnp.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = jnp.clip((scaling.original_max_position / wavelength - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_angles(positions_BT: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(cos, sin)` of each position's angles, both `[B, T, d/2]` float32."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs `(x[i], x[i + d/2])` of the last axis (half-split layout); `cos` and `sin` are `[..., d/2]`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
