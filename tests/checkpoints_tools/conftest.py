"""What tests of the command lines share."""

import jax
import numpy as np
import pytest


@pytest.fixture
def assert_equal():
    """A function that asserts that two models are the same, bit for bit."""

    def check(left, right) -> None:
        assert left.config == right.config
        assert jax.tree.structure(left) == jax.tree.structure(right)
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(one, other)

    return check
