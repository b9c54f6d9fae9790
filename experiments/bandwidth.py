"""What a decoding step has to read, and how fast this machine reads."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

COPY_BYTES = 2**30  # of the array whose copy measures the bandwidth; large against any cache


def copy_bandwidth() -> float:
    """Bytes a second that reading and writing a large array reaches, the best of several."""
    import jax
    import jax.numpy as jnp

    copy = jax.jit(lambda x: x + 1.0)
    x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    jax.block_until_ready(copy(x))
    return 2 * COPY_BYTES / min(seconds(lambda: copy(x)) for _ in range(5))


def seconds(function: Callable[[], Any]) -> float:
    """Time of a call, its result ready on the device."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def step_bytes(
    architecture, batch_size: int, inputs_length: int, new_tokens: int, cache_dtype: str | None, weights: str | None
) -> dict:
    """What one decoding step reads: weights once, and all of the caches as they are allocated."""
    import jax
    import jax.numpy as jnp

    from gqa import models
    from gqa.models.quantize import quantize

    def num_bytes(*parts) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts))

    model = models.abstract(architecture)
    if weights is not None:
        model = jax.eval_shape(lambda model: quantize(model, weights), model)
    is_t5 = isinstance(model, models.t5.T5)
    read = num_bytes(model.decoder, model.embedding if architecture.tied_logits else model.logits)
    if is_t5:  # keys and values of the inputs are computed once
        read -= num_bytes(*((site.key, site.value) for site in models.site_attention(model, "cross")))
    # A key and a value of a head and position; int8 has a float32 scale each.
    entry = jnp.dtype(architecture.dtype).itemsize * architecture.head_dim
    if cache_dtype == "int8":
        entry = architecture.head_dim + 4
    per_token = {
        site: 2 * sum(architecture.kv_heads(site)) * entry * batch_size
        for site in ("decoder_self", "cross")[: 1 + is_t5]
    }
    length = new_tokens if is_t5 else inputs_length + new_tokens - 1
    return {
        "weights": read,
        "self_cache": per_token["decoder_self"] * length,
        "cross_cache": per_token["cross"] * inputs_length if is_t5 else 0,
    }


def cache_seconds(architecture, batch_size: int, inputs_length: int, new_tokens: int) -> float:
    """Time that attention alone takes to read what a step reads of all caches, the median of several.

    Scores, softmax and sums of one query a head and row, layer after layer, each with a cache of its own.
    """
    import jax
    import jax.numpy as jnp

    from gqa import models
    from gqa.nn.attention import grouped_query_attention

    is_t5 = isinstance(architecture, models.t5.T5Config)
    lengths = {"decoder_self": new_tokens if is_t5 else inputs_length + new_tokens - 1, "cross": inputs_length}
    shapes = [
        (batch_size, K, lengths[site], architecture.head_dim)
        for site in ("decoder_self", "cross")[: 1 + is_t5]
        for K in architecture.kv_heads(site)
    ]

    def attend(query_BTHd, caches):
        options = dict(bias_HTS=None, mask_BTS=None)
        return sum(grouped_query_attention(query_BTHd, key, value, **options) for key, value in caches)

    query = jnp.ones((batch_size, 1, architecture.num_heads, architecture.head_dim), architecture.dtype)
    caches = [tuple(jnp.full(shape, 0.01, architecture.dtype) for _ in range(2)) for shape in shapes]
    attend = jax.jit(attend)
    jax.block_until_ready(attend(query, caches))
    return float(np.median([seconds(lambda: attend(query, caches)) for _ in range(7)]))
