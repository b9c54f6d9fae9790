"""T5's buckets against literal values, its bias rows, and the properties of rotary embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.nn.position import (
    RelativePositionBias,
    RopeScaling,
    relative_position_bucket,
    rotary_angles,
    rotary_frequencies,
    rotate,
)

LLAMA3 = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_position=8192)


def test_bidirectional_buckets():
    # 32 buckets: 16 for keys behind, 16 for keys ahead; each exact below 8, logarithmic up to 128.
    distance = jnp.array(
        [0, -1, -7, -8, -11, -12, -15, -16, -22, -23, -64, -127, -128, -5000, 1, 7, 8, 15, 16, 127, 128]
    )
    expected = [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 14, 15, 15, 15, 17, 23, 24, 25, 26, 31, 31]
    assert relative_position_bucket(distance, bidirectional=True, num_buckets=32, max_distance=128).tolist() == expected


def test_causal_buckets():
    # 32 buckets for keys behind, exact below 16; keys ahead share bucket 0.
    distance = jnp.array([5, 0, -1, -15, -16, -18, -19, -20, -21, -23, -24, -64, -112, -113, -127, -128, -5000])
    expected = [0, 0, 1, 15, 16, 16, 17, 17, 18, 18, 19, 26, 30, 31, 31, 31, 31]
    assert (
        relative_position_bucket(distance, bidirectional=False, num_buckets=32, max_distance=128).tolist() == expected
    )


@pytest.mark.parametrize(
    ("distance", "bidirectional", "num_buckets", "max_distance", "expected"),
    [([-10, -9, 9, 10], True, 6, 100, [2, 1, 4, 5]), ([-40, -39], False, 64, 50, [48, 46])],
)
def test_buckets_that_begin_at_a_whole_number(distance, bidirectional, num_buckets, max_distance, expected):
    sizes = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    assert relative_position_bucket(jnp.array(distance), **sizes).tolist() == expected


@pytest.fixture(params=[True, False], ids=["bidirectional", "causal"])
def bias(request) -> RelativePositionBias:
    return RelativePositionBias(
        3,
        num_buckets=8,
        max_distance=20,
        bidirectional=request.param,
        stddev=1.0,
        param_dtype="float32",
        key=jax.random.key(0),
    )


def test_bias_is_the_table_at_the_bucket_of_each_pair(bias):
    num_queries, num_keys, offset = 4, 30, 11
    distance = np.arange(num_keys)[None, :] - (offset + np.arange(num_queries))[:, None]
    sizes = dict(bidirectional=bias.bidirectional, num_buckets=8, max_distance=20)
    bucket_TS = relative_position_bucket(jnp.asarray(distance), **sizes)
    expected_HTS = np.asarray(bias.table[...])[bucket_TS].transpose(2, 0, 1)
    np.testing.assert_array_equal(bias(num_queries, num_keys, offset), expected_HTS)


def test_rows_at_an_offset_equal_rows_of_the_whole(bias):
    whole = bias(17, 17, 0)
    row = jax.jit(lambda offset: bias(1, 17, offset))
    for offset in range(17):
        np.testing.assert_array_equal(row(offset)[:, 0], whole[:, offset])
    np.testing.assert_array_equal(bias(5, 17, 9), whole[:, 9:14])


def rotated(x, positions, theta=10000.0):
    cos, sin = rotary_angles(jnp.asarray(positions), rotary_frequencies(x.shape[-1], theta, None))
    return rotate(x, cos, sin)


def test_rotary_frequencies():
    np.testing.assert_allclose(rotary_frequencies(8, 10000.0, None), [1, 0.1, 0.01, 0.001], rtol=1e-6)


def test_position_zero_is_not_rotated_and_a_quarter_turn_swaps_halves():
    x = jnp.arange(1.0, 5.0)[None, None]  # pairs (1, 3) and (2, 4)
    np.testing.assert_array_equal(rotated(x, [[0]]), x)
    quarter = jnp.full((1, 1, 2), jnp.pi / 2)
    np.testing.assert_allclose(rotate(x, jnp.cos(quarter), jnp.sin(quarter))[0, 0], [-3, -4, 1, 2], atol=1e-6)


def test_rotation_keeps_norms():
    x = jax.random.normal(jax.random.key(0), (2, 50, 16))
    turned = rotated(x, np.arange(50)[None] * 7)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_scores_depend_on_the_difference_of_positions_only():
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 16))

    def score(query_position, key_position):
        return jnp.sum(rotated(query, [[query_position]]) * rotated(key, [[key_position]]))

    np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-4)
    np.testing.assert_allclose(score(3, 3), jnp.sum(query * key), rtol=1e-5)
    assert abs(score(7, 3) - score(3, 7)) > 0.1


def test_llama3_scaling_keeps_fast_and_stretches_slow_frequencies():
    plain, scaled = rotary_frequencies(128, 500000.0, None), rotary_frequencies(128, 500000.0, LLAMA3)
    wavelength = 2 * np.pi / np.asarray(plain)
    fast, slow = wavelength < 8192 / 4, wavelength > 8192
    assert fast.sum() == 29 and slow.sum() == 29
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = np.asarray(scaled / plain)[~fast & ~slow]
    assert np.all((between > 1 / 8) & (between < 1)) and np.all(np.diff(between) < 0)
