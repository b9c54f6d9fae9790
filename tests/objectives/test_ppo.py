"""PPO's parts against numbers worked out by hand and TRL's formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.errors import InputError
from gqa.objectives.ppo import (
    clipped_objective,
    combined_scores,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    token_rewards,
    value_loss,
    whiten,
)


def responses(seed=0):
    """Log-probabilities of two policies, values and weights `[8, 12]`, of unequal lengths."""
    rng = np.random.default_rng(seed)
    weights = (np.arange(12) < rng.integers(1, 13, (8, 1))).astype(np.float32)
    new, old = -rng.exponential(1.5, (2, 8, 12)).astype(np.float32)
    return new, old, rng.normal(0, 2, (8, 12)).astype(np.float32), weights


def test_advantages_by_hand():
    """γ = 0.5, λ = 0.5. δ = [1 + .5 * 4 - 2, 0 + .5 * 6 - 4, 8 - 6] = [1, -1, 2]; A_2 = 2, A_1 = -1 + .25 * 2, …"""
    rewards, values = jnp.array([[1.0, 0.0, 8.0, 99.0]]), jnp.array([[2.0, 4.0, 6.0, 99.0]])
    weights = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    advantages, returns = generalised_advantages(rewards, values, weights, discount=0.5, decay=0.5)
    np.testing.assert_allclose(advantages, [[0.875, -0.5, 2.0, 0.0]])
    np.testing.assert_allclose(returns, [[2.875, 3.5, 8.0, 0.0]])


def test_advantages_as_in_trl():
    rewards, _, values, weights = responses(1)
    found, returns = generalised_advantages(rewards, values, weights, discount=0.97, decay=0.9)
    masked_values, masked_rewards = values * weights, rewards * weights
    last, reversed_advantages = 0, []
    for t in reversed(range(12)):
        following = masked_values[:, t + 1] if t < 11 else 0.0
        delta = masked_rewards[:, t] + 0.97 * following - masked_values[:, t]
        last = delta + 0.97 * 0.9 * last
        reversed_advantages.append(last)
    expected = np.stack(reversed_advantages[::-1], axis=1)
    np.testing.assert_allclose(found, expected * weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, (expected + masked_values) * weights, rtol=1e-5, atol=1e-6)


def test_clipped_objective_by_hand():
    """Ratios 2, 2, 1/2, 1/2 and advantages 1, -1, 1, -1 with clip 0.2: -1.2, 2, -0.5, 0.8; the first and last clip."""
    new, old = jnp.log(jnp.array([[2.0, 2.0, 0.5, 0.5, 7.0]])), jnp.zeros((1, 5))
    advantages, weights = jnp.array([[1.0, -1.0, 1.0, -1.0, 5.0]]), jnp.array([[1.0, 1.0, 1.0, 1.0, 0.0]])
    found = clipped_objective(new, old, advantages, weights, clip=0.2)
    assert float(found.loss_sum) == pytest.approx(-1.2 + 2 - 0.5 + 0.8, abs=1e-6)
    assert float(found.clipped_sum) == 2
    # KL of the sampler from the policy, k3: ratio - 1 - log ratio
    assert float(found.kl_sum) == pytest.approx(2 * (2 - 1 - np.log(2)) + 2 * (0.5 - 1 - np.log(0.5)), rel=1e-5)
    # Where the ratio is clipped and the advantage asks for more of it, there is no gradient.
    gradient = jax.grad(lambda new: clipped_objective(new, old, advantages, weights, clip=0.2).loss_sum)(new)
    np.testing.assert_allclose(gradient, [[0.0, 2.0, -0.5, 0.0, 0.0]], atol=1e-6)


def test_clipped_objective_and_value_loss_as_in_trl():
    new, old, values, weights = responses(2)
    rng = np.random.default_rng(3)
    advantages, returns, old_values = rng.normal(0, 1, (3, 8, 12)).astype(np.float32)

    def masked_mean(x):
        return (x * weights).sum() / weights.sum()

    ratio = np.exp(new.astype(np.float64) - old)
    expected = masked_mean(np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - 0.2, 1 + 0.2)))
    found = clipped_objective(new, old, advantages, weights, clip=0.2)
    assert float(found.loss_sum) / weights.sum() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    clipped = np.clip(values, old_values - 0.2, old_values + 0.2)
    expected = 0.5 * masked_mean(np.maximum((values - returns) ** 2, (clipped - returns) ** 2))
    found = value_loss(values, old_values, returns, weights, clip=0.2)
    assert float(found) / weights.sum() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_kl_estimators():
    new, old, *_ = responses(4)
    np.testing.assert_allclose(kl_estimate(new, old, "k1"), new - old, rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(new, old, "k3"), np.exp(old - new) - 1 - (old - new), rtol=1e-5, atol=1e-6)
    # Both are right on average: exactly, under the policy's own distribution.
    p, q = jax.nn.softmax(jnp.array([1.0, 2.0, 0.0])), jax.nn.softmax(jnp.array([0.0, 1.0, 3.0]))
    true = float(jnp.sum(p * jnp.log(p / q)))
    for estimator in ("k1", "k3"):
        assert float(jnp.sum(p * kl_estimate(jnp.log(p), jnp.log(q), estimator))) == pytest.approx(true, rel=1e-5)
    with pytest.raises(InputError, match="kl estimator 'k2'; expected one of k1, k3"):
        kl_estimate(new, old, "k2")


def test_whitening():
    """By hand: 1, 2, 3, 6 have mean 3 and variance 14 / 3; and as TRL's masked_whiten."""
    found = whiten(jnp.array([1.0, 2.0, 3.0, 6.0, 99.0]), jnp.array([1.0, 1.0, 1.0, 1.0, 0.0]), shift_mean=True)
    np.testing.assert_allclose(found[:4], np.array([-2, -1, 0, 3]) / np.sqrt(14 / 3), rtol=1e-6)
    values, _, _, weights = responses(5)
    mean = (values * weights).sum() / weights.sum()
    variance = ((values - mean) ** 2 * weights).sum() / weights.sum() * weights.sum() / (weights.sum() - 1)
    for shift_mean in (True, False):
        expected = (values - mean) / np.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
        np.testing.assert_allclose(whiten(values, weights, shift_mean=shift_mean), expected, rtol=1e-5, atol=1e-6)


def test_rewards_by_token():
    found = token_rewards(
        jnp.array([5.0, 7.0]),
        jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]),
        jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
        beta=0.1,
    )
    np.testing.assert_allclose(found, [[-0.1, -0.2, 4.7], [-0.1, 6.8, 0.0]], rtol=1e-6)


def test_two_reward_models_as_one():
    """σ(-2) = 0.12 is below the gate 0.15, σ(-1.5) = 0.18 is not; a tagged prompt has its safety score in any case."""
    found = combined_scores(
        jnp.array([5.0, 5.0, 5.0]), jnp.array([-2.0, -1.5, 3.0]), jnp.array([False, False, True]), gate=0.15
    )
    np.testing.assert_array_equal(found, [-2.0, 5.0, 3.0])


def test_group_advantages_by_hand():
    """1, 2, 3 have mean 2 and deviation 1; a group whose samples are alike teaches nothing."""
    found = group_advantages(jnp.array([1.0, 2.0, 3.0, 4.0, 4.0, 4.0]), 3)
    np.testing.assert_allclose(found, [-1, 0, 1, 0, 0, 0], atol=1e-6)
