"""From responses and their scores to gradient steps: what is measured once, advantages, the losses of both models.

The value model is a reward model's copy, trained apart from the policy: it starts as what it has to predict, a score
of what stands there so far, and its gradients do not pull at the policy's features as those of a shared trunk do. It
costs a second model's memory. Its values are in the units of the rewards: standard deviations of the initial policy's.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa.models.llama import Llama
from gqa.models.reward import RewardModel
from gqa.objectives.language_model import Sums
from gqa.objectives.ppo import (
    clipped_objective,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    token_rewards,
    value_loss,
    whiten,
)
from gqa.posttraining.config import PPOConfig
from gqa.posttraining.rollouts import (
    Responses,
    in_parts,
    response_log_probs,
    response_values,
)
from gqa.sharding import constrain


class Scale(NamedTuple):
    """Mean and standard deviation of the initial policy's scores: whitening that stays as it is (Llama 2 §3.2.3).

    Whitened batch by batch, rewards would have mean 0 however good the policy becomes, and noise would grow as it
    becomes sure; fixed, a reward of 1 is one deviation gained, and values have a target that stays.
    """

    mean: jax.Array
    deviation: jax.Array


class Measured(NamedTuple):
    """What the models say of the responses before any gradient step, `[B, N]`."""

    reference_BN: jax.Array  # log-probabilities
    values_BN: jax.Array | None  # in the scale's units; None: no value model


class Batch(NamedTuple):
    """What gradient steps read, rows `B`."""

    responses: Responses
    reference_BN: jax.Array
    advantages_BN: jax.Array
    values_BN: jax.Array | None
    returns_BN: jax.Array | None


@functools.partial(jax.jit, static_argnames="size")
def measure(
    reference: Llama,
    value: RewardModel | None,
    responses: Responses,
    scale: Scale,
    *,
    temperature: float,
    size: int,
) -> Measured:
    """Asks each model once, `size` rows at a time."""

    def of_part(responses: Responses) -> Measured:
        return Measured(
            response_log_probs(reference, responses, temperature),
            None if value is None else _values(value, responses, scale),
        )

    return in_parts(of_part, size, responses)


@functools.partial(jax.jit, static_argnames="config")
def prepare(
    responses: Responses, measured: Measured, scores_B: jax.Array, scale: Scale, beta: jax.Array, config: PPOConfig
) -> tuple[Batch, dict[str, jax.Array]]:
    """The batch of an iteration, and its metrics."""
    weights_BN = responses.weights_BN
    total = jnp.sum(weights_BN)
    rewards_B = (scores_B - scale.mean) / scale.deviation
    # The sampler kept its log-probabilities: they are what the ratio is taken to, and no forward is spent on them.
    kl_BN = kl_estimate(responses.sampled_BN, measured.reference_BN, "k1") * weights_BN
    metrics = {
        "reward": jnp.mean(rewards_B),
        "reward_max": jnp.max(rewards_B),
        "score": jnp.mean(scores_B),
        "kl": jnp.mean(jnp.sum(kl_BN, axis=1)),
        "entropy": -jnp.sum(responses.sampled_BN * weights_BN) / total,  # of what was drawn: right on average
        "length": jnp.mean(responses.counts_B.astype(jnp.float32)),
        "ended": jnp.mean(responses.ended_B.astype(jnp.float32)),
        "beta": beta,
    }
    if config.method == "grpo":
        advantages_BN = group_advantages(rewards_B, config.samples_per_prompt)[:, None] * weights_BN
        values_BN = returns_BN = None
    else:
        values_BN = measured.values_BN
        # Llama 2 eq. 4 by token
        rewards_BN = token_rewards(rewards_B, kl_BN, weights_BN, beta)
        advantages_BN, returns_BN = generalised_advantages(
            rewards_BN, values_BN, weights_BN, discount=config.discount, decay=config.decay
        )
        advantages_BN = whiten(advantages_BN, weights_BN, shift_mean=True) * weights_BN
        metrics["explained_variance"] = 1 - _variance(returns_BN - values_BN, weights_BN) / jnp.maximum(
            _variance(returns_BN, weights_BN), 1e-8
        )
    batch = Batch(
        responses,
        measured.reference_BN,
        advantages_BN,
        values_BN=values_BN,
        returns_BN=returns_BN,
    )
    return batch, metrics


@jax.jit
def rows_of(batch: Batch, rows: jax.Array) -> Batch:
    """A mini-batch."""
    return jax.tree.map(lambda x: constrain(x[rows], "batch", *(None,) * (x.ndim - 1)), batch)


def policy_loss(config: PPOConfig, temperature: float):
    """The loss of a policy's step as `make_train_step` takes it, with β beside the batch.

    PPO's KL is in the rewards, and its mean is over tokens. GRPO's KL is in the loss, estimated by k3, and its mean is
    over responses of their tokens' mean (Shao et al. 2024 eq. 3 and 4).
    """

    def loss_fn(policy: Llama, batch: Batch, key, step, beta) -> Sums:
        weights_BN = batch.responses.weights_BN
        num_tokens = jnp.sum(weights_BN)
        log_probs_BN = response_log_probs(policy, batch.responses, temperature)
        sampled_BN = batch.responses.sampled_BN
        arguments = log_probs_BN, sampled_BN, batch.advantages_BN
        found = clipped_objective(*arguments, weights_BN, clip=config.clip)
        loss_sum, added_sum, weight_sum = found.loss_sum, jnp.zeros(()), num_tokens
        if config.method == "grpo":
            weights_BN = weights_BN / jnp.maximum(jnp.sum(weights_BN, axis=1, keepdims=True), 1)
            loss_sum = clipped_objective(*arguments, weights_BN, clip=config.clip).loss_sum
            # Behind a response's end nothing is trained, and a difference there may be beyond exp's range.
            reference_BN = jnp.where(weights_BN > 0, batch.reference_BN, log_probs_BN)
            added_sum = beta * jnp.sum(kl_estimate(log_probs_BN, reference_BN, "k3") * weights_BN)
            weight_sum = jnp.sum(weights_BN)
        difference = jnp.max(jnp.abs(log_probs_BN - sampled_BN) * batch.responses.weights_BN)
        named = {
            "clipped": (found.clipped_sum, num_tokens),
            "step_kl": (found.kl_sum, num_tokens),
            "sampler_difference": (difference, jnp.ones(())),
        }
        return Sums(
            loss_sum=loss_sum,
            z_loss_sum=jnp.zeros(()),
            correct_sum=jnp.zeros(()),
            weight_sum=weight_sum,
            added_sum=added_sum,
            named=named,
        )

    return loss_fn


def value_model_loss(config: PPOConfig):
    """The loss of a value model's step as `make_train_step` takes it, with the scale beside the batch."""

    def loss_fn(value: RewardModel, batch: Batch, key, step, scale: Scale) -> Sums:
        weights_BN = batch.responses.weights_BN
        values_BN = _values(value, batch.responses, scale)
        return Sums(
            loss_sum=value_loss(values_BN, batch.values_BN, batch.returns_BN, weights_BN, clip=config.value_clip),
            z_loss_sum=jnp.zeros(()),
            correct_sum=jnp.zeros(()),
            weight_sum=jnp.sum(weights_BN),
            added_sum=jnp.zeros(()),
            named={},
        )

    return loss_fn


def _values(value: RewardModel, responses: Responses, scale: Scale) -> jax.Array:
    return (response_values(value, responses) - scale.mean) / scale.deviation


def _variance(values_BN: jax.Array, weights_BN: jax.Array) -> jax.Array:
    total = jnp.sum(weights_BN)
    mean = jnp.sum(values_BN * weights_BN) / total
    return jnp.sum(jnp.square(values_BN - mean) * weights_BN) / total
