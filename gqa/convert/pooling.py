"""The paper's conversions of key/value heads: mean, first and random (GQA §2.1, fig. 4).

Each takes one attention and its new number of key/value heads K, which divides the present one: neighbouring heads
form a group, and each group's key and value projections become one. Kernels are `[..., D, K, d]`; query and output
kernels stay as they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gqa.nn.attention import GroupedQueryAttention


def mean(
    attention: GroupedQueryAttention, statistics: None, num_kv_heads: int, key: jax.Array
) -> GroupedQueryAttention:
    """The mean of each group's projection kernels, computed in float32 or wider and kept in the kernels' dtype."""

    def pool(kernel_DKd):
        heads = _groups(kernel_DKd, num_kv_heads).astype(jnp.promote_types(kernel_DKd.dtype, jnp.float32))
        # Around the first head, so that equal heads give back exactly themselves (3 x / 3 need not be x).
        first = heads[..., :1, :]
        pooled = first + jnp.mean(heads - first, axis=-2, keepdims=True)
        return pooled[..., 0, :].astype(kernel_DKd.dtype)

    return _map_key_value(pool, attention)


def first(
    attention: GroupedQueryAttention, statistics: None, num_kv_heads: int, key: jax.Array
) -> GroupedQueryAttention:
    """The first head of each group."""
    return _map_key_value(lambda kernel_DKd: _groups(kernel_DKd, num_kv_heads)[..., 0, :], attention)


def random(
    attention: GroupedQueryAttention, statistics: None, num_kv_heads: int, key: jax.Array
) -> GroupedQueryAttention:
    """Fresh heads: normal with standard deviation 1/sqrt(D), the initialisation of both families' keys and values."""
    keys = iter(jax.random.split(key))

    def initialise(kernel_DKd):
        *leading, D, _, d = kernel_DKd.shape
        return D**-0.5 * jax.random.normal(next(keys), (*leading, D, num_kv_heads, d), kernel_DKd.dtype)

    return _map_key_value(initialise, attention)


def _groups(kernel_DKd: jax.Array, num_groups: int) -> jax.Array:
    """`[..., D, K, d]` as `[..., D, num_groups, heads per group, d]`."""
    *leading, K, d = kernel_DKd.shape
    assert K % num_groups == 0, (K, num_groups)
    return kernel_DKd.reshape(*leading, num_groups, K // num_groups, d)


def _map_key_value(change: Callable[[jax.Array], jax.Array], attention: GroupedQueryAttention) -> GroupedQueryAttention:
    """A copy of `attention` with its key and value kernels changed."""
    attention = jax.tree.map(lambda leaf: leaf, attention)
    attention.key = attention.key.replace(change(attention.key[...]))
    attention.value = attention.value.replace(change(attention.value[...]))
    return attention
