import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa import models
from gqa.convert import METHODS, convert, pooling
from gqa.errors import InputError
from gqa.nn.attention import AttentionInit, AttentionShape, GroupedQueryAttention

KEY = jax.random.key(0)
HEADS_AND_GROUPS = st.sampled_from([(1, 1), (1, 7), (2, 1), (2, 3), (2, 4), (4, 3), (6, 6)])  # K, heads per group
DTYPES = st.sampled_from(["float32", "bfloat16"])


def attention(*, D, H, K, d, dtype="float32", key=KEY, qkv_bias=False, qk_norm_epsilon=None):
    init = AttentionInit(query=1.0, key_value=1.0, out=1.0)
    shape = AttentionShape(D, H, K, d, scale=1.0, qkv_bias=qkv_bias, qk_norm_epsilon=qk_norm_epsilon)
    return GroupedQueryAttention(shape, init, dtype, key)


def with_kernels(module, key, value):
    module = jax.tree.map(lambda leaf: leaf, module)
    module.key, module.value = module.key.replace(key), module.value.replace(value)
    return module


@functools.cache
def attention_without_heads():
    return attention(D=3, H=1, K=1, d=2)


def random_attention(num_kv_heads, dtype, seed):
    """Key and value kernels [3, K, 2] beside arbitrary others."""
    kernels = np.random.default_rng(seed).normal(size=(2, 3, num_kv_heads, 2))
    return with_kernels(attention_without_heads(), *(jnp.asarray(kernel, dtype) for kernel in kernels))


@functools.cache
def t5(num_decoder_layers=2):
    return models.create(dataclasses.replace(models.size("t5_1_1_mini"), num_decoder_layers=num_decoder_layers), KEY)


@functools.cache
def llama():
    return models.create(models.size("llama_mini"), KEY)


@functools.cache
def llama_with_biases_and_norms():
    config = models.replace(models.size("llama_mini"), qkv_bias=True, qk_norm=True)
    # Biases start at zero, norms at one: drawn anew, so that a mix-up shows.
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), models.create(config, KEY))


def arrays(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(left, right):
    left, right = arrays(left), arrays(right)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def layers(model, site):
    """Each layer's attention at `site`, whatever the stacks."""
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        for stack in models.site_attention(model, site)
        for i in range(stack.key.shape[0])
    ]


# D=1, K=4, d=2: heads (1, 2), (3, 4), (5, 6), (9, 12).
HEADS = jnp.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 12.0]]])


@pytest.mark.parametrize(
    ("method", "num_kv_heads", "expected"),
    [
        ("mean", 2, [[2.0, 3.0], [7.0, 9.0]]),
        ("mean", 1, [[4.5, 6.0]]),
        ("first", 2, [[1.0, 2.0], [5.0, 6.0]]),
        ("first", 1, [[1.0, 2.0]]),
    ],
)
def test_literal_examples(method, num_kv_heads, expected):
    module = with_kernels(attention(D=1, H=4, K=4, d=2), HEADS, 10 * HEADS)
    converted = METHODS[method](module, None, num_kv_heads, KEY)
    np.testing.assert_array_equal(converted.key[...], [expected])
    np.testing.assert_array_equal(converted.value[...], 10 * np.array([expected]))
    assert module.key.shape == (1, 4, 2), "the input was changed"
    assert_same((converted.query, converted.out), (module.query, module.out))
    assert converted.key.get_metadata("axes") == ("embed", "kv_heads", "head_dim")


@pytest.mark.parametrize(
    ("method", "expected"),
    [("mean", [[2.0, 3.0], [7.0, 9.0]]), ("first", [[1.0, 2.0], [5.0, 6.0]]), ("random", [[0.0, 0.0], [0.0, 0.0]])],
)
def test_biases_of_keys_and_values_convert_as_their_kernels(method, expected):
    module = attention(D=1, H=4, K=4, d=2, qkv_bias=True, qk_norm_epsilon=1e-6)
    module.key_bias.set_value(HEADS[0])
    module.value_bias.set_value(10 * HEADS[0])
    module.query_bias.set_value(-HEADS[0])
    converted = METHODS[method](module, None, 2, KEY)
    np.testing.assert_array_equal(converted.key_bias[...], expected)
    np.testing.assert_array_equal(converted.value_bias[...], 10 * np.array(expected))
    assert converted.key_bias.get_metadata("axes") == ("kv_heads", "head_dim")
    assert module.key_bias.shape == (4, 2), "the input was changed"
    assert_same(
        (converted.query_bias, converted.query_norm, converted.key_norm),
        (module.query_bias, module.query_norm, module.key_norm),
    )


@pytest.mark.parametrize("method", ["mean", "first"])
def test_equal_heads_with_biases_and_norms_compute_the_same_pooled(method):
    model = llama_with_biases_and_norms()
    equal = jax.tree.map(lambda leaf: leaf, model)
    for stack in models.site_attention(equal, "decoder_self"):
        for name in ("key", "value", "key_bias", "value_bias"):
            projection = getattr(stack, name)
            projection.set_value(jnp.repeat(projection[...][..., ::2, :], 2, axis=-2))
    converted = convert(equal, {"decoder_self": 2}, method, KEY)
    inputs = np.random.default_rng(0).integers(0, 256, (2, 6))
    np.testing.assert_allclose(converted(inputs), equal(inputs), rtol=1e-5, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=8)
@given(HEADS_AND_GROUPS, DTYPES, st.integers(0, 2**32))
def test_mean_is_numpys_mean_and_first_its_first(heads_and_groups, dtype, seed):
    K, heads_per_group = heads_and_groups
    module = random_attention(K * heads_per_group, dtype, seed)
    groups = np.asarray(module.value[...]).astype(np.float64).reshape(3, K, heads_per_group, 2)
    mean = pooling.mean(module, None, K, KEY).value[...]
    assert mean.dtype == dtype
    tolerance = 1e-6 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(np.asarray(mean).astype(np.float64), groups.mean(axis=2), rtol=tolerance, atol=tolerance)
    first = pooling.first(module, None, K, KEY).value[...]
    np.testing.assert_array_equal(np.asarray(first).astype(np.float64), groups[:, :, 0])


@settings(deadline=None, derandomize=True, max_examples=8)
@given(HEADS_AND_GROUPS, st.sampled_from(["mean", "first"]), DTYPES, st.integers(0, 2**32))
def test_equal_heads_pool_without_loss(heads_and_groups, method, dtype, seed):
    K, heads_per_group = heads_and_groups
    small = random_attention(K, dtype, seed)
    key, value = (np.repeat(kernel, heads_per_group, axis=-2) for kernel in (small.key[...], small.value[...]))
    large = with_kernels(small, jnp.asarray(key), jnp.asarray(value))
    assert_same(METHODS[method](large, None, K, KEY), small)


def test_mean_of_means_is_the_mean():
    module = attention(D=8, H=8, K=8, d=4)
    nested = pooling.mean(pooling.mean(module, None, 4, KEY), None, 2, KEY)
    direct = pooling.mean(module, None, 2, KEY)
    np.testing.assert_allclose(nested.key[...], direct.key[...], atol=1e-6)
    np.testing.assert_allclose(nested.value[...], direct.value[...], atol=1e-6)


def test_random_has_the_initial_scale_and_ignores_the_old_heads():
    module = attention(D=256, H=8, K=8, d=64)
    converted = pooling.random(module, None, 2, KEY)
    doubled = with_kernels(module, 2 * module.key[...], 2 * module.value[...])
    assert_same(pooling.random(doubled, None, 2, KEY), converted)
    for kernel in (converted.key[...], converted.value[...]):
        # 32768 draws of standard deviation 1/16: the standard error of either figure is under 4e-4.
        assert kernel.shape == (256, 2, 64)
        assert abs(float(kernel.std()) - 256**-0.5) < 2e-3
        assert abs(float(kernel.mean())) < 2e-3
    assert not np.array_equal(converted.key[...], converted.value[...])
    other = pooling.random(module, None, 2, jax.random.key(1))
    assert not np.array_equal(other.key[...], converted.key[...])


@pytest.mark.parametrize("make", [t5, llama_with_biases_and_norms])
@pytest.mark.parametrize("method", METHODS)
def test_as_many_heads_as_before_is_the_identity(make, method):
    model = make()
    sites = models.FAMILIES[models.family_of(model.config)].sites
    converted = convert(model, dict.fromkeys(sites, 4), method, KEY)
    assert converted.config == model.config
    assert_same(converted, model)


@pytest.mark.parametrize("make", [t5, llama, llama_with_biases_and_norms])
@pytest.mark.parametrize("method", METHODS)
def test_only_the_sites_heads_change(make, method):
    model = make()
    before = arrays(model)
    sites = models.FAMILIES[models.family_of(model.config)].converted_sites
    converted = convert(model, {site: 2 for site in sites}, method, KEY)
    after = arrays(converted)
    changed = {name for name in after if after[name].shape != before[name].shape}
    projections = ("key", "value", "key_bias", "value_bias")
    assert changed == {name for name in before if "decoder" in name and name.split(".")[-2] in projections}
    for name in after.keys() - changed:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert all(converted.config.kv_heads(site) == (2, 2) for site in sites)
    # The same structure as a model made with this configuration: checkpoints and shardings fit.
    assert jax.tree.structure(models.abstract(converted.config)) == jax.tree.structure(converted)


def test_convert_leaves_the_model_as_it_was():
    model, config, before = t5(), t5().config, arrays(t5())
    convert(model, {"decoder_self": 1, "cross": (2, 1)}, "mean", KEY)
    assert model.config is config
    after = arrays(model)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["mean", "random"])
def test_numbers_per_layer(method):
    model = t5(num_decoder_layers=4)
    converted = convert(model, {"decoder_self": (2, 2, 1, 1), "cross": (4, 1, 1, 1)}, method, KEY)
    assert converted.config.decoder_self_kv_heads == (2, 2, 1, 1)
    assert converted.config.cross_kv_heads == (4, 1, 1, 1)
    shapes = [stack.key.shape for stack in models.site_attention(converted, "decoder_self")]  # [L, D, K, d]
    assert shapes == [(1, 64, 2, 16), (1, 64, 2, 16), (2, 64, 1, 16)]
    two, one = (convert(model, {"decoder_self": K, "cross": K}, method, KEY) for K in (2, 1))
    for layer, (self_attention, cross) in enumerate(zip([two, two, one, one], [model, one, one, one], strict=True)):
        assert_same(layers(converted, "decoder_self")[layer], layers(self_attention, "decoder_self")[layer])
        assert_same(layers(converted, "cross")[layer], layers(cross, "cross")[layer])
    # Layers that become equal share a stack again.
    again = convert(converted, {"decoder_self": 1, "cross": (1, 1, 1, 1)}, method, KEY)
    assert again.config == dataclasses.replace(model.config, decoder_self_kv_heads=1, cross_kv_heads=1)
    assert len(again.decoder) == 1
    assert jax.tree.structure(models.abstract(again.config)) == jax.tree.structure(again)


def test_a_converted_model_computes_what_its_heads_repeated_compute():
    model = t5()
    inputs, targets = jnp.arange(10).reshape(2, 5), jnp.arange(6).reshape(2, 3)
    grouped = convert(model, {"decoder_self": 2, "cross": 1}, "mean", KEY)
    repeated = jax.tree.map(lambda leaf: leaf, model)
    for site in ("decoder_self", "cross"):
        (small,), (large,) = models.site_attention(grouped, site), models.site_attention(repeated, site)
        for name in ("key", "value"):
            kernel = getattr(small, name)[...]
            setattr(large, name, getattr(large, name).replace(jnp.repeat(kernel, 4 // kernel.shape[-2], axis=-2)))
    forward = jax.jit(lambda model: model(inputs, targets))
    np.testing.assert_allclose(forward(grouped), forward(repeated), atol=1e-5)


@pytest.mark.parametrize(
    ("kv_heads", "method", "message"),
    [
        (
            {"decoder_self": 2},
            "median",
            "method='median' is unknown; expected one of mean, first, random, procrustes, svd, svd_values, "
            "with +group, +renorm, +tune, +refit",
        ),
        (
            {"decoder_self": 2},
            "svd",
            "method='svd' works on calibration text; expected one of mean, first, random here",
        ),
        ({"self": 2}, "mean", "attention site 'self' is unknown; expected one of encoder_self, decoder_self, cross"),
        ({"cross": 3}, "mean", "cross_kv_heads=3 does not divide the 4 key/value heads of layer 0; nearest: 2, 4"),
        ({"cross": 8}, "mean", "cross_kv_heads=8 does not divide the 4 key/value heads of layer 0; nearest: 4"),
        ({"cross": 0}, "mean", "cross_kv_heads=0 does not divide the 4 key/value heads of layer 0; nearest: 1"),
        ({"cross": (4, 3)}, "mean", "cross_kv_heads=3 does not divide the 4 key/value heads of layer 1; nearest: 2, 4"),
        ({"cross": (4, 2, 1)}, "mean", "cross_kv_heads names 3 layers, the model has 2; give 1 number or 2"),
    ],
)
def test_bad_input(kv_heads, method, message):
    with pytest.raises(InputError) as error:
        convert(t5(), kv_heads, method, KEY)
    assert str(error.value) == message
