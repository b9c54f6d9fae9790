import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.convert import procrustes

SHAPES = st.sampled_from([(2, 2, 1, 2), (4, 2, 1, 4), (4, 4, 2, 2), (8, 4, 1, 4)])  # units, of a group, G, d


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, rotary=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_copies_turned_away_are_turned_back(shape, rotary, seed, attention_case, rebased, copied, outputs):
    K, size, G, d = shape
    rng = np.random.default_rng(seed)
    heads, x_query, x_key_value, moments = attention_case(rng, K, G, d, biases=rotary)
    heads = rebased(rng, copied(heads, size), rotary, orthogonal=True)
    aligned = procrustes.align(heads, moments, K // size, rotary)
    expected = outputs(heads, x_query, x_key_value, rotary)
    for new in (aligned, procrustes.mean(aligned, K // size)):
        np.testing.assert_allclose(outputs(new, x_query, x_key_value, rotary), expected, atol=1e-7)


@pytest.mark.parametrize("rotary", [False, True])
def test_alignment_is_the_same_function_with_a_larger_mean(rotary, attention_case, outputs):
    heads, x_query, x_key_value, moments = attention_case(np.random.default_rng(0), 6, 2, 4)
    aligned = procrustes.align(heads, moments, 2, rotary)
    inputs = (x_query, x_key_value, rotary)
    np.testing.assert_allclose(outputs(aligned, *inputs), outputs(heads, *inputs), atol=1e-9)
    sizes = [
        [np.trace(moments.of_values(mean)), np.trace(moments.of_keys(mean, centred=not rotary))]
        for mean in (procrustes.mean(heads, 2), procrustes.mean(aligned, 2))
    ]
    assert np.all(np.array(sizes[1]) > 1.2 * np.array(sizes[0])), sizes
    # A fixed point: alignment of what is aligned turns nothing any more.
    again = procrustes.align(aligned, moments, 2, rotary)
    np.testing.assert_allclose(np.trace(moments.of_values(procrustes.mean(again, 2))), sizes[1][0], rtol=0.02)


def test_norms_are_restored(attention_case):
    heads, _, _, moments = attention_case(np.random.default_rng(0), 6, 1, 4)
    pooled = procrustes.restore_norm(procrustes.mean(heads, 2), heads, moments)

    def norms(sigma):
        return np.sqrt(np.diagonal(sigma).reshape(-1, 4).sum(1))

    for after, before in (
        (moments.of_keys(pooled, centred=False), moments.of_keys(heads, centred=False)),
        (moments.of_values(pooled), moments.of_values(heads)),
    ):
        np.testing.assert_allclose(norms(after), norms(before).reshape(2, 3).mean(1))
    # Opposite heads: a mean of nothing stays nothing.
    signs = np.array([1, -1, 1, 1, -1, 1])[:, None]
    opposite = heads._replace(key=heads.key[:, :1] * signs, value=heads.value[:, :1] * signs)
    zero = procrustes.restore_norm(procrustes.mean(opposite, 3), opposite, moments)
    np.testing.assert_array_equal(zero.key[:, [0, 2]], 0)
    np.testing.assert_allclose(zero.key[:, 1], heads.key[:, 0])
