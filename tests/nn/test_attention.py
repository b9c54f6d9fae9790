"""Grouped-query attention against repeated-head attention written out, and literal masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.nn.attention import (
    AttentionInit,
    AttentionShape,
    GroupedQueryAttention,
    causal_mask,
    grouped_query_attention,
    padding_mask,
    plain_attention,
    prefix_mask,
    segment_mask,
    sliding_window_mask,
)
from gqa.nn.layers import Dropout

B, T, S, H, d = 2, 3, 5, 8, 4
POSITIONS = jnp.arange(4)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def multi_head_attention(query_BTHd, key_BHSd, value_BHSd, bias_HTS, mask_BTS):
    """softmax(q kᵀ + bias) v, one head and one row at a time."""
    out_BTHd = np.zeros(query_BTHd.shape)
    for b in range(B):
        for h in range(H):
            scores = query_BTHd[b, :, h] @ key_BHSd[b, h].T + bias_HTS[h]
            weights = np.where(mask_BTS[b], np.exp(scores), 0)
            out_BTHd[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value_BHSd[b, h]
    return out_BTHd


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_equals_multi_head_attention_with_repeated_heads(K):
    query, bias = normal(0, B, T, H, d), normal(3, H, T, S)
    key, value = normal(1, B, K, S, d), normal(2, B, K, S, d)
    mask = np.random.default_rng(4).random((B, T, S)) < 0.7
    mask[..., 0] = True  # every query sees something
    # Query head h reads key/value head h // G.
    expected = multi_head_attention(query, np.repeat(key, H // K, 1), np.repeat(value, H // K, 1), bias, mask)
    found = grouped_query_attention(query, key, value, bias_HTS=bias, mask_BTS=mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("K", [1, 2])
def test_gradients_sum_over_a_group(K):
    query, key, value = normal(0, B, T, H, d), normal(1, B, K, S, d), normal(2, B, K, S, d)
    weights = normal(3, B, T, H, d)

    def loss(key, value):
        return jnp.sum(weights * grouped_query_attention(query, key, value, bias_HTS=None, mask_BTS=None))

    found = jax.grad(loss, (0, 1))(key, value)
    repeated = jax.grad(loss, (0, 1))(np.repeat(key, H // K, 1), np.repeat(value, H // K, 1))
    for gradient, expected in zip(found, repeated, strict=True):
        np.testing.assert_allclose(gradient, expected.reshape(B, K, H // K, S, d).sum(2), rtol=1e-5, atol=1e-6)


def test_gradients_of_a_bias_of_each_row():
    query, key, value = normal(0, B, T, H, d), normal(1, B, 2, S, d), normal(2, B, 2, S, d)

    def gradient(attend):
        loss = lambda bias: jnp.sum(jnp.sin(attend(query, key, value, bias_HTS=bias, mask_BTS=None)))  # noqa: E731
        return jax.grad(loss)(normal(3, B, H, T, S))

    expected = gradient(plain_attention)
    np.testing.assert_allclose(gradient(grouped_query_attention), expected, rtol=1e-4, atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    query, key, value = normal(0, B, T, H, d), normal(1, B, 2, S, d), normal(2, B, 2, S, d)
    out = grouped_query_attention(query, key, value, bias_HTS=None, mask_BTS=np.zeros((B, T, S), bool))
    np.testing.assert_allclose(out[:, :, 0], np.broadcast_to(value[:, :1].mean(2), (B, T, d)), rtol=1e-5, atol=1e-6)


def test_scores_of_bfloat16_queries_are_float32():
    # Scores around 50: bfloat16 would round them by up to 0.125, and the weights by as many times 100 %.
    query, key = (jnp.asarray(normal(seed, B, n, m, d) + 3.5, jnp.bfloat16) for seed, n, m in ((0, T, 2), (1, 1, S)))
    value = jnp.broadcast_to(jnp.eye(S, d, dtype=jnp.bfloat16), (B, 1, S, d))  # the output is the weights of d keys
    out = grouped_query_attention(query, key, value, bias_HTS=None, mask_BTS=None)
    scores = np.einsum("BTHd,BSd->BTHS", np.asarray(query, np.float64), np.asarray(key, np.float64)[:, 0])
    assert out.dtype == jnp.bfloat16
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(out.astype(np.float32), expected[..., :d], rtol=2**-7, atol=1e-6)


def test_dropout_is_on_the_weights_and_keeps_their_expectation():
    # One-hot values: the output of head h at position t is its row of weights, 1/S each before dropout.
    query, key = np.zeros((200, 3, 2, S), np.float32), np.zeros((200, 1, S, S), np.float32)
    value = np.broadcast_to(np.eye(S, dtype=np.float32), (200, 1, S, S))
    dropout = Dropout(0.4, jax.random.key(0))
    found = np.asarray(
        grouped_query_attention(query, key, value, bias_HTS=None, mask_BTS=None, dropout=dropout, site=0)
    )
    kept = found != 0
    assert (kept == kept[:, :1]).all()  # a mask for all queries of a head
    np.testing.assert_allclose(found[kept], 1 / S / 0.6, rtol=1e-6)
    assert abs(kept.mean() - 0.6) < 0.04  # 2000 draws: more than three standard deviations


def test_dropout_sites_and_keys_have_masks_of_their_own():
    x = jnp.ones((8, 8))
    masks = [Dropout(0.5, jax.random.key(key))(x, site) for key, site in ((0, 0), (0, 1), (1, 0))]
    assert len({mask.tobytes() for mask in map(np.asarray, masks)}) == 3
    np.testing.assert_array_equal(masks[0], Dropout(0.5, jax.random.key(0))(x, 0))


def site(D: int, *, qkv_bias: bool = False, qk_norm_epsilon: float | None = None) -> GroupedQueryAttention:
    """An attention site of 8 query and 2 key/value heads, its parameters all random."""
    shape = AttentionShape(D, H, 2, d, scale=1.0, qkv_bias=qkv_bias, qk_norm_epsilon=qk_norm_epsilon)
    init = AttentionInit(query=1.0, key_value=1.0, out=1.0)
    module = GroupedQueryAttention(shape, init, "float32", jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(normal(leaf.size, *leaf.shape)), module)


def test_biases_are_kernels_of_an_input_that_is_always_one():
    x, module, wider = normal(0, B, S, 3), site(3, qkv_bias=True), site(4)
    for name in ("query", "key", "value"):
        kernel, bias = getattr(module, name)[...], getattr(module, f"{name}_bias")[...]
        getattr(wider, name).set_value(jnp.concatenate([kernel, bias[None]]))
    x_and_one = np.concatenate([x, np.ones((B, S, 1), np.float32)], axis=-1)
    np.testing.assert_allclose(module.project_query(x), wider.project_query(x_and_one), rtol=1e-5, atol=1e-5)
    for found, expected in zip(module.project_key_value(x), wider.project_key_value(x_and_one), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_norms_are_of_each_query_and_key_head_and_not_of_values():
    x, module, plain = normal(0, B, S, 3), site(3, qk_norm_epsilon=0.5), site(3)

    def normalised(heads, norm):
        return heads / np.sqrt(np.square(heads).mean(-1, keepdims=True) + 0.5) * np.asarray(norm.scale[...])

    np.testing.assert_allclose(
        module.project_query(x), normalised(plain.project_query(x), module.query_norm), rtol=1e-5, atol=1e-5
    )
    (key, value), (plain_key, plain_value) = module.project_key_value(x), plain.project_key_value(x)
    np.testing.assert_allclose(key, normalised(plain_key, module.key_norm), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(value, plain_value)
    assert module.query_norm.scale.shape == module.key_norm.scale.shape == (d,)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_norm_epsilon", [1e-6, None])
def test_a_site_has_the_parameters_that_it_uses(qkv_bias, qk_norm_epsilon):
    names = {"query", "key", "value", "out"}
    names |= {"query_bias", "key_bias", "value_bias"} if qkv_bias else set()
    names |= {"query_norm.scale", "key_norm.scale"} if qk_norm_epsilon else set()
    leaves = jax.tree_util.tree_leaves_with_path(site(3, qkv_bias=qkv_bias, qk_norm_epsilon=qk_norm_epsilon))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    assert {path.removesuffix(".value") if path != "value" else path for path in paths} == names


def test_biases_start_at_zero_and_norms_at_one():
    shape = AttentionShape(3, H, 2, d, scale=1.0, qkv_bias=True, qk_norm_epsilon=1e-6)
    module = GroupedQueryAttention(shape, AttentionInit(1.0, 1.0, 1.0), "bfloat16", jax.random.key(0))
    for name, heads, axis in (("query", H, "heads"), ("key", 2, "kv_heads"), ("value", 2, "kv_heads")):
        bias = getattr(module, f"{name}_bias")
        np.testing.assert_array_equal(bias[...], np.zeros((heads, d)))
        assert bias.dtype == jnp.bfloat16 and bias.get_metadata("axes") == (axis, "head_dim")
    for norm in (module.query_norm, module.key_norm):
        np.testing.assert_array_equal(norm.scale[...], np.ones(d))
        assert norm.scale.get_metadata("axes") == ("head_dim",)


def test_gradients_of_biases_are_summed_in_float32():
    """Over 8,192 positions: one by one in bfloat16, sums would stop where a step of their own is more than a term."""
    shape = AttentionShape(3, 2, 1, 4, scale=1.0, qkv_bias=True, qk_norm_epsilon=None)
    module = GroupedQueryAttention(shape, AttentionInit(1.0, 1.0, 1.0), "float32", jax.random.key(0))
    x = jnp.ones((1, 8192, 3), jnp.bfloat16)
    weights = jax.random.uniform(jax.random.key(1), (1, 8192, 2, 4)).astype(jnp.bfloat16)
    found = jax.jit(jax.grad(lambda module, w: jnp.sum((module.project_query(x) * w).astype(jnp.float32))))(
        module, weights
    )
    np.testing.assert_allclose(found.query_bias[...], weights.astype(jnp.float32).sum((0, 1)), rtol=1e-4)


def as_text(mask) -> list[str]:
    """One row of a mask per query, `x` where it may attend."""
    return ["".join("x" if seen else "." for seen in row) for row in np.asarray(mask)]


def test_causal_mask():
    mask = causal_mask(POSITIONS, POSITIONS)
    assert mask.shape == (1, 4, 4)
    assert as_text(mask[0]) == [
        "x...",
        "xx..",
        "xxx.",
        "xxxx",
    ]


def test_causal_mask_of_new_tokens_over_a_longer_cache():
    assert as_text(causal_mask(jnp.array([1, 2]), POSITIONS)[0]) == ["xx..", "xxx."]


def test_masks_of_rows_with_positions_of_their_own():
    positions = jnp.array([[1, 2], [2, 3]])
    masks = causal_mask(positions, POSITIONS), sliding_window_mask(positions, POSITIONS, 2)
    assert [as_text(row) for row in masks[0]] == [["xx..", "xxx."], ["xxx.", "xxxx"]]
    assert [as_text(row) for row in masks[0] & masks[1]] == [["xx..", ".xx."], [".xx.", "..xx"]]


def test_sliding_window_mask():
    mask = causal_mask(POSITIONS, POSITIONS) & sliding_window_mask(POSITIONS, POSITIONS, 2)
    assert as_text(mask[0]) == [
        "x...",
        "xx..",
        ".xx.",
        "..xx",
    ]


def test_segment_mask():
    segments = jnp.array([[1, 1, 2, 0]])
    assert as_text(segment_mask(segments, segments)[0]) == [
        "xx..",
        "xx..",
        "..x.",
        "...x",
    ]


def test_segment_mask_between_decoder_and_inputs():
    assert as_text(segment_mask(jnp.array([[1, 2, 2, 0]]), jnp.array([[1, 1, 1, 2]]))[0]) == [
        "xxx.",
        "...x",
        "...x",
        "....",
    ]


def test_padding_mask():
    mask = padding_mask(jnp.array([[1, 1, 2, 0]]))
    assert mask.shape == (1, 1, 4)
    assert as_text(mask[0]) == ["xxx."]


def test_prefix_mask():
    mask = prefix_mask(causal_mask(POSITIONS, POSITIONS), jnp.array([[True, True, False, False]]))
    assert as_text(mask[0]) == [
        "xx..",
        "xx..",
        "xxx.",
        "xxxx",
    ]
