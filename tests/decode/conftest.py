"""What the tests of draws share."""

import numpy as np
import pytest
import scipy.stats


@pytest.fixture(scope="session")
def check_frequencies():
    """A function (counts, probabilities): the counts may well be draws of the distribution (chi-square)."""

    def check(found, expected) -> None:
        found, expected = np.asarray(found), np.asarray(expected, np.float64)
        expected = found.sum() * expected / expected.sum()
        assert found[expected == 0].sum() == 0
        # The rarest together, so that every bin expects at least ten draws.
        order = np.argsort(expected)
        num_rare = np.searchsorted(np.cumsum(expected[order]), 10) + 1
        rare, common = order[:num_rare], order[num_rare:]
        assert len(common) > 20
        bins = [[*of[common], of[rare].sum()] for of in (found, expected)]
        assert scipy.stats.chisquare(*bins).pvalue > 0.001

    return check
