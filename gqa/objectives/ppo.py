"""Proximal policy optimisation of responses: rewards by token, advantages, the clipped objective, the value's loss.

All of responses `[B, T]` with weights 1 on their tokens and 0 elsewhere, padded on the right.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa.errors import InputError

KL_ESTIMATORS = ("k1", "k3")


class PolicyLoss(NamedTuple):
    """Sums over tokens."""

    loss_sum: jax.Array  # to be minimised
    clipped_sum: jax.Array  # tokens whose ratio was clipped
    kl_sum: jax.Array  # from the policy that sampled, estimator k3


def kl_estimate(log_probs_BT: jax.Array, reference_BT: jax.Array, estimator: str) -> jax.Array:
    """KL(policy || reference) at each token, of tokens sampled from the policy (Schulman 2020).

    `k1` is unbiased and may be negative; `k3` is unbiased, never negative and of less variance.
    """
    log_ratio_BT = reference_BT - log_probs_BT
    if estimator == "k1":
        return -log_ratio_BT
    if estimator == "k3":
        return jnp.exp(log_ratio_BT) - 1 - log_ratio_BT
    raise InputError(f"kl estimator {estimator!r}; expected one of {', '.join(KL_ESTIMATORS)}")


def whiten(values: jax.Array, weights: jax.Array, *, shift_mean: bool) -> jax.Array:
    """Values over their standard deviation where `weights` is 1, and of mean 0 if `shift_mean`.

    The variance is the unbiased one, as in TRL. Weights of any shape that values have.
    """
    total = jnp.sum(weights)
    mean = jnp.sum(values * weights) / total
    variance = jnp.sum(jnp.square(values - mean) * weights) / jnp.maximum(total - 1, 1)
    whitened = (values - mean) * jax.lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def combined_scores(helpfulness_B: jax.Array, safety_B: jax.Array, is_safety_B: jax.Array, *, gate: float) -> jax.Array:
    """`logit(R_c)` of two reward models' scores, which are logits: the safety model's where the prompt is tagged as one of
    safety or its probability is below `gate` (Llama 2: 0.15), else the helpfulness model's (Llama 2 §3.2.3)."""
    return jnp.where(is_safety_B | (jax.nn.sigmoid(safety_B) < gate), safety_B, helpfulness_B)


def group_advantages(scores_B: jax.Array, group_size: int) -> jax.Array:
    """Scores less the mean of their group, over its standard deviation (GRPO, Shao et al. 2024 §4.1.2).

    A group is `group_size` neighbours, the samples of one prompt.
    """
    of_group = lambda scores: whiten(scores, jnp.ones_like(scores), shift_mean=True)  # noqa: E731
    return jax.vmap(of_group)(scores_B.reshape(-1, group_size)).reshape(-1)


def token_rewards(scores_B: jax.Array, kl_BT: jax.Array, weights_BT: jax.Array, beta: float) -> jax.Array:
    """`-β KL` at each token, and the score at the last one (Llama 2 eq. 4 by token; Ziegler et al. 2019 eq. 2)."""
    last_BT = weights_BT * (jnp.cumsum(weights_BT, axis=-1) == jnp.sum(weights_BT, axis=-1, keepdims=True))
    return (last_BT * scores_B[:, None] - beta * kl_BT) * weights_BT


def generalised_advantages(
    rewards_BT: jax.Array, values_BT: jax.Array, weights_BT: jax.Array, *, discount: float, decay: float
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns `[B, T]` of every token (Schulman et al. 2016 eq. 16), 0 where weights are.

    Args:
      values_BT: of the state before each token; behind the last token there is nothing to come.
      discount, decay: γ and λ.
    """
    rewards_BT, values_BT = rewards_BT * weights_BT, values_BT * weights_BT
    next_values_BT = jnp.pad(values_BT[:, 1:], ((0, 0), (0, 1)))
    deltas_BT = rewards_BT + discount * next_values_BT - values_BT  # GAE eq. 10

    def step(advantage_B, delta_B):
        advantage_B = delta_B + discount * decay * advantage_B
        return advantage_B, advantage_B

    _, advantages_TB = jax.lax.scan(step, jnp.zeros_like(deltas_BT[:, 0]), deltas_BT.T, reverse=True)
    advantages_BT = advantages_TB.T * weights_BT
    return advantages_BT, (advantages_BT + values_BT) * weights_BT


def clipped_objective(
    log_probs_BT: jax.Array, sampled_BT: jax.Array, advantages_BT: jax.Array, weights_BT: jax.Array, *, clip: float
) -> PolicyLoss:
    """PPO's loss (Schulman et al. 2017 eq. 7, negated), summed over tokens.

    `sampled_BT` are the log-probabilities under the policy that sampled the tokens; Llama 2 clips at 0.2.
    """
    log_ratio_BT = log_probs_BT - sampled_BT
    ratio_BT = jnp.exp(log_ratio_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - clip, 1 + clip)
    losses_BT = jnp.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)  # PPO eq. 7
    is_clipped_BT = -advantages_BT * clipped_BT > -advantages_BT * ratio_BT
    return PolicyLoss(
        loss_sum=jnp.sum(losses_BT * weights_BT),
        clipped_sum=jnp.sum(is_clipped_BT * weights_BT),
        kl_sum=jnp.sum(kl_estimate(sampled_BT, log_probs_BT, "k3") * weights_BT),
    )


def value_loss(
    values_BT: jax.Array, sampled_values_BT: jax.Array, returns_BT: jax.Array, weights_BT: jax.Array, *, clip: float
) -> jax.Array:
    """Half the squared error of the values, the larger of with and without a clip of their move, summed over tokens.

    `sampled_values_BT` are the values when the tokens were sampled (PPO's first implementation, OpenAI baselines).
    """
    clipped_BT = sampled_values_BT + jnp.clip(values_BT - sampled_values_BT, -clip, clip)
    errors_BT = jnp.maximum(jnp.square(values_BT - returns_BT), jnp.square(clipped_BT - returns_BT))
    return 0.5 * jnp.sum(errors_BT * weights_BT)
