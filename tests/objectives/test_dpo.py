"""DPO and its variants against numbers worked out by hand and the authors' formulas in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.errors import InputError
from gqa.objectives.dpo import Pair, dpo
from gqa.objectives.log_probs import segment_sums, target_log_probs

PLAIN = dict(beta=0.1, loss="sigmoid", label_smoothing=0.0, lengths=None)


def pairs(seed=0, size=64):
    rng = np.random.default_rng(seed)
    policy, reference = (Pair(*rng.normal(-40, 15, (2, size))) for _ in range(2))
    lengths = Pair(*rng.integers(1, 40, (2, size)))
    return policy, reference, lengths


def test_log_2_where_policy_is_reference():
    policy, _, lengths = pairs()
    for options in (PLAIN, PLAIN | {"label_smoothing": 0.3}, PLAIN | {"lengths": lengths}):
        np.testing.assert_allclose(dpo(policy, policy, **options).loss, math.log(2), rtol=1e-6)
    # IPO: (0 - 1 / (2 * 0.1))^2
    np.testing.assert_allclose(dpo(policy, policy, **PLAIN | {"loss": "ipo"}).loss, 25.0, rtol=1e-6)


def test_by_hand():
    """Ratios 2 and -1: margin 0.1 * 3 = 0.3; -log σ(0.3) = 0.554355, -log σ(-0.3) = 0.854355."""
    policy, reference = Pair(jnp.array([-8.0]), jnp.array([-21.0])), Pair(jnp.array([-10.0]), jnp.array([-20.0]))
    found = dpo(policy, reference, **PLAIN)
    assert found.loss[0] == pytest.approx(0.554355, abs=1e-6)
    assert [float(reward[0]) for reward in found.rewards] == pytest.approx([0.2, -0.1])
    assert float(found.margin[0]) == pytest.approx(0.3) and float(found.correct[0]) == 1
    assert dpo(policy, reference, **PLAIN | {"label_smoothing": 0.1}).loss[0] == pytest.approx(0.584355, abs=1e-6)
    assert dpo(policy, reference, **PLAIN | {"loss": "ipo"}).loss[0] == pytest.approx(4.0)  # (3 - 5)^2
    # Ratios over 4 and 10 tokens: 0.5 and -0.1; margin 0.06.
    lengths = Pair(jnp.array([4]), jnp.array([10]))
    assert dpo(policy, reference, **PLAIN | {"lengths": lengths}).margin[0] == pytest.approx(0.06)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_authors_formulas(smoothing, normalised):
    """`preference_loss` of eric-mitchell/direct-preference-optimization, whose IPO and cDPO are those of TRL."""
    policy, reference, lengths = pairs(1)
    options = dict(beta=0.3, label_smoothing=smoothing, lengths=lengths if normalised else None)
    if normalised:
        policy, reference = (
            Pair(*(np.divide(x, n) for x, n in zip(p, lengths, strict=True))) for p in (policy, reference)
        )
    pi_logratios = policy.chosen - policy.rejected
    ref_logratios = reference.chosen - reference.rejected
    logits = pi_logratios - ref_logratios

    def logsigmoid(x):
        return -np.logaddexp(0, -x)

    expected = -logsigmoid(0.3 * logits) * (1 - smoothing) - logsigmoid(-0.3 * logits) * smoothing
    policy32, reference32, _ = pairs(1)
    np.testing.assert_allclose(
        dpo(policy32, reference32, loss="sigmoid", **options).loss, expected, rtol=2e-6, atol=1e-6
    )
    if not smoothing:
        found = dpo(policy32, reference32, loss="ipo", **options).loss
        np.testing.assert_allclose(found, (logits - 1 / (2 * 0.3)) ** 2, rtol=3e-6, atol=1e-6)


def test_the_gradient_is_that_of_dpo_section_4():
    """dL/d log π_w = -β σ(r_l - r_w), and the opposite for the rejected response."""
    policy, reference, _ = (Pair(*map(jnp.asarray, pair)) for pair in pairs(2))
    gradients = jax.grad(lambda policy: dpo(policy, reference, **PLAIN).loss.sum())(policy)
    margin = dpo(policy, reference, **PLAIN).margin
    np.testing.assert_allclose(gradients.chosen, -0.1 / (1 + np.exp(margin)), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(gradients.rejected, -gradients.chosen, rtol=1e-6)


def test_options_that_are_none():
    policy, reference, _ = pairs()
    for changes, message in (
        ({"loss": "hinge"}, "dpo.loss='hinge'; expected one of sigmoid, ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 with loss sigmoid; expected"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing=0.1 with loss ipo; expected"),
    ):
        with pytest.raises(InputError, match=message):
            dpo(policy, reference, **PLAIN | changes)


def test_log_probs_of_packed_responses():
    logits = np.random.default_rng(0).normal(0, 3, (2, 6, 11)).astype(np.float32)
    targets = np.array([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 1]])
    expected = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected, targets[..., None], -1)[..., 0]
    found = target_log_probs(logits, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    sums = segment_sums(found, jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 4, 4]]), 4)

    def of(row, *places):
        return expected[row, list(places)].sum()

    np.testing.assert_allclose(
        sums,
        [[of(0, 0, 1), of(0, 2, 3, 4), 0, 0], [of(1, 0), of(1, 1), of(1, 2, 3), of(1, 4, 5)]],
        rtol=1e-5,
    )
