import jax
import numpy as np
import pytest

from gqa.convert.heads import Heads, read_heads, write_heads
from gqa.convert.svd import complex_moments, rotary_energy
from gqa.nn.attention import AttentionInit, AttentionShape, GroupedQueryAttention

A, K, G, d = 13, 3, 2, 4  # 12 inputs and the constant


@pytest.fixture(scope="module")
def attention():
    """Of random weights with biases and norms; jax.eval_shape and NumPy: nothing compiles."""
    shape = AttentionShape(A - 1, K * G, K, d, scale=1.0, qkv_bias=True, qk_norm_epsilon=1e-6)
    init = AttentionInit(query=1.0, key_value=1.0, out=1.0)
    abstract = jax.eval_shape(lambda: GroupedQueryAttention(shape, init, "float32", jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract)


def test_heads_are_read_and_written(attention):
    heads = read_heads(attention)
    np.testing.assert_array_equal(heads.query[:-1], attention.query[...])
    np.testing.assert_array_equal(heads.value[-1], attention.value_bias[...])
    again = write_heads(attention, heads)
    assert jax.tree.structure(again) == jax.tree.structure(attention)
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(attention), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("rotary", [False, True])
def test_units_in_another_order_are_the_same_function(rotary, attention_case, outputs):
    heads, x_query, x_key_value, _ = attention_case(np.random.default_rng(0), K, G, d)
    order = np.array([2, 0, 1])
    permuted = heads.permuted(order)
    np.testing.assert_array_equal(permuted.key[:, 0], heads.key[:, 2])
    np.testing.assert_array_equal(permuted.query[:, :2], heads.query[:, 4:])
    inputs = (x_query, x_key_value, rotary)
    np.testing.assert_allclose(outputs(permuted, *inputs), outputs(heads, *inputs), atol=1e-12)


def test_moments_are_those_of_queries_keys_and_values(attention_case):
    heads, x_query, x_key_value, moments = attention_case(np.random.default_rng(0), K, G, d, biases=True)
    x_query, x_key_value = (np.append(x, np.ones((len(x), 1)), axis=1) for x in (x_query, x_key_value))
    query = np.einsum("TA,AHd->THd", x_query, heads.query)
    key, value = (np.einsum("SA,AKd->SKd", x_key_value, each) for each in (heads.key, heads.value))
    for unit in range(K):
        expected = sum(query[:, head].T @ query[:, head] for head in (2 * unit, 2 * unit + 1)) / len(query)
        np.testing.assert_allclose(moments.of_queries(heads)[unit], expected, atol=1e-12)
    flat = key.reshape(len(key), -1)
    np.testing.assert_allclose(moments.of_keys(heads, centred=False), flat.T @ flat / len(flat), atol=1e-12)
    np.testing.assert_allclose(moments.of_keys(heads, centred=True), np.cov(flat.T, bias=True), atol=1e-12)
    flat = value.reshape(len(value), -1)
    np.testing.assert_allclose(moments.of_values(heads), flat.T @ flat / len(flat), atol=1e-12)

    z = key[..., : d // 2] + 1j * key[..., d // 2 :]
    expected = np.einsum("Sgi,Shi->igh", z, z.conj()) / len(z)
    np.testing.assert_allclose(complex_moments(heads, moments), expected, atol=1e-12)
    energy = np.abs(query[..., : d // 2] + 1j * query[..., d // 2 :]) ** 2
    np.testing.assert_allclose(
        rotary_energy(moments.of_queries(heads)), energy.mean(0).reshape(K, G, -1).sum(1), atol=1e-12
    )


def test_energy_of_queries_that_inputs_never_reach_is_not_below_zero(attention_case):
    heads, _, _, moments = attention_case(np.random.default_rng(0), K, G, d)
    rounded = type(moments)(moments.query - 1e-7 * np.eye(A), moments.key_value, moments.tokens)
    unreached = Heads(heads.query * np.eye(A)[-1][:, None, None] * 0 + 1e-9, *heads[1:])
    assert (rotary_energy(rounded.of_queries(unreached)) >= 0).all()
