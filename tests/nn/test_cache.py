import jax
import jax.numpy as jnp
import numpy as np

from gqa.nn.cache import Int8KVCache, KVCache

B, K, S, d = 3, 2, 8, 16


def new(T, seed):
    keys = jax.random.split(jax.random.key(seed))
    # Heads and positions of very different size.
    sizes = 10.0 ** jax.random.uniform(jax.random.key(7), (B, K, T, 1), minval=-3, maxval=3)
    return [sizes * jax.random.normal(key, (B, K, T, d)) for key in keys]


def test_rows_are_written_at_indices_of_their_own():
    key, value = new(2, 0)
    written = KVCache.zeros(B, K, S, d, dtype="float32").append(key, value, jnp.array([0, 3, 6]))
    expected = np.zeros((B, K, S, d), np.float32)
    for row, index in enumerate([0, 3, 6]):
        expected[row, :, index : index + 2] = key[row]
    np.testing.assert_array_equal(written.key, expected)
    same = KVCache.zeros(B, K, S, d, dtype="float32").append(key, value, jnp.int32(3))
    np.testing.assert_array_equal(same.value[:, :, 3:5], value)


def test_int8_is_off_by_at_most_a_254th_of_the_largest_of_head_and_position():
    cache = Int8KVCache.zeros(B, K, S, d)
    given = new(S, 0)
    for position in range(S):
        cache = cache.append(*(part[:, :, position : position + 1] for part in given), jnp.int32(position))
    for found, expected in zip(cache.read("float32"), given, strict=True):
        bound = np.abs(expected).max(axis=-1, keepdims=True) / 254
        assert (np.abs(found - expected) <= bound * (1 + 1e-5)).all()
    # A quarter of float32's bytes, and the scales.
    assert sum(part.nbytes for part in cache) == 2 * B * K * S * (d + 4)
    zeros = Int8KVCache.of(jnp.zeros((1, 1, 1, d)), jnp.zeros((1, 1, 1, d))).read("float32")
    assert not np.any(zeros)
