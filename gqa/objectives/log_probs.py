"""Log-probabilities of targets, and their sums over the segments of packed rows."""

import jax
import jax.numpy as jnp


def target_log_probs(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """`log p(target)` in nats, float32 `[B, T]`; all arithmetic is float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # A masked sum instead of a gather: it stays local where the vocabulary is sharded.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return target_logit_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def segment_sums(values_BT: jax.Array, segments_BT: jax.Array, num_segments: int) -> jax.Array:
    """Sums over each of the segments 1..num_segments of every row, `[B, num_segments]`; segment 0 is padding."""

    def of_row(values_T, segments_T):
        return jax.ops.segment_sum(values_T, segments_T, num_segments + 1)[1:]

    return jax.vmap(of_row)(values_BT, segments_BT)
