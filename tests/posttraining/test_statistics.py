"""Curves of the best and the median of n samples, against all subsets."""

import itertools

import numpy as np
import pytest

from gqa.posttraining.statistics import curves, table


def test_curves_are_the_mean_over_all_subsets():
    scores = np.random.default_rng(0).normal(0, 1, (3, 6))
    found = curves(scores)
    for n in range(1, 7):
        subsets = [row[list(chosen)] for row in scores for chosen in itertools.combinations(range(6), n)]
        assert found["max"][n - 1] == pytest.approx(np.mean([subset.max() for subset in subsets]), rel=1e-12)
        assert found["median"][n - 1] == pytest.approx(np.mean([np.median(subset) for subset in subsets]), rel=1e-12)


def test_curves_by_hand():
    """Of 1, 2, 6: singles have mean 3; pairs have maxima 2, 6, 6 and medians 1.5, 3.5, 4; all three 6 and 2."""
    found = curves(np.array([[6.0, 1.0, 2.0]]))
    assert found["max"] == pytest.approx([3, 14 / 3, 6])
    assert found["median"] == pytest.approx([3, 3, 2])


def test_many_samples():
    found = curves(np.arange(100.0)[None])
    assert found["max"][0] == pytest.approx(49.5) and found["max"][99] == pytest.approx(99)
    assert found["max"][9] == pytest.approx(10 / 11 * 101 - 1)  # the mean of the largest of n of 0 … N - 1
    assert found["median"] == pytest.approx([49.5] * 100)


def test_the_table():
    by_temperature = {0.7: {"max": [1.0, 2.0, 3.0], "median": [1.0, 1.0, 1.0]}}
    by_temperature[1.3] = {"max": [0.0, 2.5, 4.0], "median": [0.0, 0.5, 1.0]}
    assert table(by_temperature).splitlines() == [
        "| samples | max, T = 0.7 | max, T = 1.3 | median, T = 0.7 | median, T = 1.3 |",
        "|--:|--:|--:|--:|--:|",
        "| 1 | **1.000** | 0.000 | **1.000** | 0.000 |",
        "| 2 | 2.000 | **2.500** | **1.000** | 0.500 |",
        "| 3 | 3.000 | **4.000** | **1.000** | **1.000** |",
    ]
