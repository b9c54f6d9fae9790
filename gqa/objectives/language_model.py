"""Cross-entropy of the next token, with T5's z-loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
    """Sums over tokens, each times its weight, as float32 scalars; they add over micro-batches.

    What is minimised is `(loss_sum + z_loss_sum + added_sum) / weight_sum`; perplexity is
    `exp(loss_sum / weight_sum)`.
    """

    loss_sum: jax.Array  # -log p(target), nats
    z_loss_sum: jax.Array  # z_loss * log(Z)^2
    correct_sum: jax.Array  # 1 where no logit is higher than the target's
    weight_sum: jax.Array
    added_sum: jax.Array  # what another objective adds, such as distillation
    named: dict[str, tuple[jax.Array, jax.Array]]  # further metrics, each a sum and the weight that it is divided by


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float) -> Sums:
    """Sums of cross-entropy, z-loss, hits and weights over a batch of any leading shape.

    Logits may be of any float type; all arithmetic is float32. Targets are ids in [0, V). Weight 0 masks a token: its
    logits have a gradient of exactly zero. `z_loss` is the coefficient of log(Z)^2 (T5: 1e-4; 0.0 turns it off), which
    keeps logits from drifting away from zero (T5X `losses.py`).
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    weights_BT = weights_BT.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A masked sum instead of a gather: it fuses with the log-sum-exp, and stays local where the vocabulary is sharded.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    # Not argmax, ten times slower on CPU.
    correct_BT = target_logit_BT == jnp.max(logits_BTV, axis=-1)
    return Sums(
        loss_sum=jnp.sum((log_z_BT - target_logit_BT) * weights_BT),
        z_loss_sum=jnp.sum(z_loss * jnp.square(log_z_BT) * weights_BT),
        correct_sum=jnp.sum(correct_BT * weights_BT),
        weight_sum=jnp.sum(weights_BT),
        added_sum=jnp.zeros(()),
        named={},
    )
