"""The ranking loss and Llama 2's combined reward against numbers worked out by hand."""

import math

import numpy as np
import pytest

from gqa.objectives.reward import LARGE_MARGINS, SMALL_MARGINS, combined_reward, ranking_loss


def test_ranking_loss_by_hand():
    assert ranking_loss(1.0, 1.0, 0.0) == pytest.approx(math.log(2))
    # -log σ(2 - 0.5 - 1) = log(1 + e^-0.5)
    assert ranking_loss(2.0, 0.5, 1.0) == pytest.approx(0.474077, abs=1e-6)
    assert ranking_loss(0.0, 100.0, 1 / 3) == pytest.approx(100.333333, rel=1e-6)


def test_ranking_loss_as_in_trl():
    """`-logsigmoid(rewards_chosen - rewards_rejected - margin).mean()` of TRL's RewardTrainer."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 4, (2, 100))
    margins = np.array(LARGE_MARGINS)[rng.integers(0, 4, 100)]
    expected = np.logaddexp(0, -(chosen - rejected - margins))
    np.testing.assert_allclose(ranking_loss(chosen, rejected, margins), expected, rtol=2e-6, atol=1e-7)
    assert SMALL_MARGINS == (0, 1 / 3, 2 / 3, 1)


def test_safety_decides_where_it_is_low_or_asked_for():
    def logit(p):
        return math.log(p / (1 - p))

    helpfulness = np.array([logit(p) for p in (0.9, 0.9, 0.9, 0.2)], np.float32)
    safety = np.array([logit(p) for p in (0.14, 0.16, 0.6, 0.99)], np.float32)
    tagged = np.array([False, False, True, False])
    expected = [logit(p) for p in (0.14, 0.9, 0.6, 0.2)]
    np.testing.assert_allclose(combined_reward(helpfulness, safety, tagged), expected, rtol=1e-6)
