"""The paper's conversions of key/value heads: mean, first and random (GQA §2.1, fig. 4).

Each takes one attention and its new number of key/value heads K, which divides the present one: neighbouring heads
form a group, and each group's key and value projections become one. Kernels are `[..., D, K, d]`, biases `[..., K, d]`;
queries and the output stay as they are. Where keys are normalised, what is pooled is still their projections: the norm
comes after, and its scale, the same for all heads, stays.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gqa import models
from gqa.nn.attention import GroupedQueryAttention


def layer_keys(config: models.ModelConfig, site: str, key: jax.Array) -> jax.Array:
    """Each layer's random key, a function of `key` and of the site's and the layer's number alone."""
    number = models.FAMILIES[models.family_of(config)].sites.index(site)
    return jax.random.split(jax.random.fold_in(key, number), len(config.kv_heads(site)))


def mean(
    attention: GroupedQueryAttention, statistics: None, num_kv_heads: int, key: jax.Array
) -> GroupedQueryAttention:
    """The mean of each group's kernels and biases, computed in float32 or wider and kept in their dtype."""

    def pool(projection_Kd):
        heads = grouped(projection_Kd, num_kv_heads).astype(jnp.promote_types(projection_Kd.dtype, jnp.float32))
        # Around the first head, so that equal heads give back exactly themselves (3 x / 3 need not be x).
        first = heads[..., :1, :]
        pooled = first + jnp.mean(heads - first, axis=-2, keepdims=True)
        return pooled[..., 0, :].astype(projection_Kd.dtype)

    return _map_key_value(attention, kernels=pool, biases=pool)


def first(
    attention: GroupedQueryAttention, statistics: None, num_kv_heads: int, key: jax.Array
) -> GroupedQueryAttention:
    """The first head of each group."""

    def pick(projection_Kd):
        return grouped(projection_Kd, num_kv_heads)[..., 0, :]

    return _map_key_value(attention, kernels=pick, biases=pick)


def random(
    attention: GroupedQueryAttention, statistics: None, num_kv_heads: int, key: jax.Array
) -> GroupedQueryAttention:
    """Fresh heads as both families initialise keys and values: normal of standard deviation 1/sqrt(D), biases zero."""
    keys = iter(jax.random.split(key))

    def initialise(kernel_DKd):
        *leading, D, _, d = kernel_DKd.shape
        # Drawn in float32 whatever the dtype, so that the same seed gives the same heads.
        return (D**-0.5 * jax.random.normal(next(keys), (*leading, D, num_kv_heads, d))).astype(kernel_DKd.dtype)

    def zero(bias_Kd):
        return jnp.zeros((*bias_Kd.shape[:-2], num_kv_heads, bias_Kd.shape[-1]), bias_Kd.dtype)

    return _map_key_value(attention, kernels=initialise, biases=zero)


def grouped(projection_Kd: jax.Array, num_groups: int) -> jax.Array:
    """A kernel or bias `[..., K, d]` as `[..., num_groups, heads per group, d]`."""
    *leading, K, d = projection_Kd.shape
    assert K % num_groups == 0, (K, num_groups)
    return projection_Kd.reshape(*leading, num_groups, K // num_groups, d)


def _map_key_value(attention: GroupedQueryAttention, *, kernels: Callable, biases: Callable) -> GroupedQueryAttention:
    """A copy of `attention` with its key and value kernels, and where it has them biases, changed."""
    attention = jax.tree.map(lambda leaf: leaf, attention)
    attention.key = attention.key.replace(kernels(attention.key[...]))
    attention.value = attention.value.replace(kernels(attention.value[...]))
    if attention.qkv_bias:
        attention.key_bias = attention.key_bias.replace(biases(attention.key_bias[...]))
        attention.value_bias = attention.value_bias.replace(biases(attention.value_bias[...]))
    return attention
