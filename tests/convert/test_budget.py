import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.convert import budget
from gqa.errors import InputError


def brute_force(heads, lost):
    """The least energy lost with at most `heads`."""
    choices = itertools.product(*(options.items() for options in lost.values()))
    return min(sum(loss for _, loss in choice) for choice in choices if sum(number for number, _ in choice) <= heads)


def random_losses(rng, options, *, convex):
    """For each of 3 places a loss that falls with the number of heads; `convex`: each head saves less than the last."""
    lost = {}
    for layer in range(3):
        gains = rng.exponential(size=len(options))
        if convex:
            gains = -np.sort(-gains)
        losses = gains.sum() - np.cumsum(gains) * (rng.uniform(0.1, 3) if convex else 1)
        lost["cross" if layer == 2 else "decoder_self", layer] = dict(zip(options, losses, strict=True))
    return lost


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), heads=st.integers(3, 14))
def test_heads_that_save_ever_less_are_spent_for_the_best(seed, heads):
    lost = random_losses(np.random.default_rng(seed), [1, 2, 3, 4], convex=True)
    chosen = budget.spend(heads, lost)
    assert chosen.keys() == lost.keys() and sum(chosen.values()) == min(heads, 12)
    found = sum(lost[place][number] for place, number in chosen.items())
    np.testing.assert_allclose(found, brute_force(heads, lost), rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), heads=st.integers(3, 30))
def test_any_losses_are_at_most_one_step_from_the_best(seed, heads):
    lost = random_losses(np.random.default_rng(seed), [1, 2, 4, 8], convex=False)
    chosen = budget.spend(heads, lost)
    assert sum(chosen.values()) <= heads
    found = sum(lost[place][number] for place, number in chosen.items())
    step = max(max(options.values()) - min(options.values()) for options in lost.values())
    assert found <= brute_force(heads, lost) + step
    if heads >= 24:
        assert set(chosen.values()) == {8}


def test_literal_example():
    lost = {("decoder_self", 0): {1: 0.9, 2: 0.5, 4: 0.0}, ("cross", 0): {1: 0.1, 2: 0.05, 4: 0.0}}
    expected = {2: (1, 1), 3: (2, 1), 4: (2, 2), 5: (4, 1), 6: (4, 2), 7: (4, 2), 8: (4, 4), 100: (4, 4)}
    for heads, numbers in expected.items():
        assert tuple(budget.spend(heads, lost).values()) == numbers


def test_heads_that_save_nothing_are_not_spent():
    lost = {("decoder_self", 0): {1: 0.0, 2: 0.0, 4: 0.0}, ("decoder_self", 1): {1: 0.3, 2: 0.2, 4: 0.2}}
    assert budget.spend(8, lost) == {("decoder_self", 0): 1, ("decoder_self", 1): 2}


def test_a_budget_under_one_head_each_is_refused():
    lost = {("decoder_self", layer): {1: 0.1, 2: 0.0} for layer in range(3)}
    with pytest.raises(
        InputError, match=r"^a budget of 2 key/value heads is under 1 for each layer and site; nearest: 3$"
    ):
        budget.spend(2, lost)
