"""What a student's distribution and attention outputs miss of its teacher's, beside the cross-entropy of the text."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TopK(NamedTuple):
    """A teacher's k most likely tokens at each position; what it gives to all others is their remainder."""

    ids: jax.Array  # int32 [B, T, k]
    log_probs: jax.Array  # float32 [B, T, k], nats


def top_k(logits_BTV: jax.Array, k: int) -> TopK:
    """The k most likely tokens of logits, with their log-probabilities."""
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits_BTV.astype(jnp.float32)), k)
    return TopK(ids.astype(jnp.int32), log_probs)


def kl_to_teacher(logits_BTV: jax.Array, teacher: TopK, weights_BT: jax.Array) -> jax.Array:
    """Sum over tokens of `weight * KL(teacher || student)` in nats, all tokens outside of the teacher's k as one.

    With k = V it is the whole divergence (Hinton et al. 2015 at temperature 1). Merging the others makes it a lower
    bound of that, zero where the student agrees.
    """
    student = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    picked_BTk = jnp.take_along_axis(student, teacher.ids, axis=-1)
    kl_BT = jnp.sum(jnp.exp(teacher.log_probs) * (teacher.log_probs - picked_BTk), axis=-1)
    if teacher.ids.shape[-1] < logits_BTV.shape[-1]:
        rest_teacher = _log_remainder(teacher.log_probs)
        # Not from the picked ones: where the student is surest, their difference to 1 is lost, and its gradient.
        is_picked = jnp.put_along_axis(jnp.zeros(student.shape, bool), teacher.ids, True, axis=-1, inplace=False)
        rest_student = jax.nn.logsumexp(jnp.where(is_picked, -jnp.inf, student), axis=-1)
        kl_BT += jnp.exp(rest_teacher) * (rest_teacher - rest_student)
    return jnp.sum(kl_BT * weights_BT.astype(jnp.float32))


def attention_sizes(outputs_BLTD: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Mean over the batch's positions of each layer's `‖output‖²`, float32 `[B, L]`: the same numbers in every row.

    So a part of the rows still has the whole batch's.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    size_BLT = jnp.sum(jnp.square(outputs_BLTD.astype(jnp.float32)), -1) * weights_BT[:, None]
    mean_size_L = size_BLT.sum((0, 2)) / jnp.maximum(weights_BT.sum(), 1.0)
    return jnp.broadcast_to(jnp.maximum(mean_size_L, 1e-12), size_BLT.shape[:2])


def attention_error(
    student: Mapping[str, list[jax.Array]],
    teacher: Mapping[str, jax.Array],
    sizes: Mapping[str, jax.Array],
    weights_BT: jax.Array,
) -> jax.Array:
    """Sum over tokens and mean over sites and layers of `weight * ‖student - teacher‖² / mean ‖teacher‖²`.

    Args:
      student: by site of the decoder, each layer's attention output `[B, T, D]`.
      teacher: the same, layers stacked `[B, L, T, D]`.
      sizes: `attention_sizes` of the teacher's, of the whole batch where these rows are a micro-batch.
      weights_BT: of the positions.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    errors = []
    for site, target_BLTD in teacher.items():
        difference_BLTD = jnp.stack(student[site], axis=1).astype(jnp.float32) - target_BLTD.astype(jnp.float32)
        squared_BLT = jnp.sum(jnp.square(difference_BLTD), -1) * weights_BT[:, None]
        errors.append(jnp.mean(jnp.sum(squared_BLT.sum(2) / sizes[site], axis=0)))
    return sum(errors) / len(errors)


def _log_remainder(log_probs_BTk: jax.Array) -> jax.Array:
    """Log of the probability that the named tokens leave, kept above 1e-6 so that rounding gives no infinity."""
    return jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(log_probs_BTk), axis=-1), 1e-6))
