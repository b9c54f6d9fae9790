"""T5: packing, padding, key/value heads per layer, stacks, remat, dropout, sizes; tests/parity has the comparisons."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa import models
from gqa.errors import InputError
from gqa.models.stacks import init_stacks, num_layers
from gqa.models.t5 import T5Config

# Two layers a side, four query heads; grouped in the decoder.
CONFIG = models.replace(
    models.size("t5_1_1_mini"),
    vocab_size=40,
    d_model=16,
    num_heads=4,
    head_dim=8,
    d_ff=24,
    decoder_self_kv_heads=2,
    cross_kv_heads=1,
)

forward = jax.jit(lambda model, *tokens, **options: model(*tokens, **options))


def model_of(seed: int = 0, **changes) -> models.t5.T5:
    """A model with random weights, norms included; drawn by numpy, which has nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype)

    return jax.tree.map(draw, models.abstract(models.replace(CONFIG, **changes)))


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, CONFIG.vocab_size, shape)


def with_kv_heads_repeated(model, config: T5Config):
    """The multi-head model that computes the same: each key/value head repeated for its group, one layer per stack."""
    changed = model.unstacked()
    for stack in [*changed.encoder, *changed.decoder]:
        for name in ("self_attention", "cross_attention"):
            if attention := getattr(stack, name, None):
                for kernel in (attention.key, attention.value):
                    kernel.set_value(jnp.repeat(kernel[...], config.num_heads // kernel.shape[-2], axis=-2))
    return changed


@pytest.mark.parametrize(
    "kv_heads",
    [
        dict(encoder_self_kv_heads=4, decoder_self_kv_heads=2, cross_kv_heads=1),
        dict(encoder_self_kv_heads=(2, 4), decoder_self_kv_heads=(4, 1), cross_kv_heads=(2, 2)),
    ],
)
def test_key_value_heads_per_site_and_layer_equal_the_repeated_model(kv_heads):
    model = model_of(**kv_heads)
    repeated = with_kv_heads_repeated(model, model.config)
    assert {stack.self_attention.key.shape for stack in repeated.decoder} == {(1, 16, 4, 8)}
    inputs, targets = tokens(0, 1, 5), tokens(1, 1, 4)
    np.testing.assert_allclose(
        forward(model, inputs, targets), forward(repeated, inputs, targets), rtol=1e-5, atol=1e-5
    )


def test_stacks_are_runs_of_equal_layers():
    changes = dict(num_decoder_layers=5, decoder_self_kv_heads=(4, 4, 2, 2, 2), cross_kv_heads=(1, 1, 1, 1, 2))
    model = models.abstract(models.replace(CONFIG, **changes))
    assert [num_layers(stack) for stack in model.encoder] == [2]
    assert [num_layers(stack) for stack in model.decoder] == [2, 2, 1]
    heads = [attention.key.shape[-2] for attention in models.site_attention(model, "decoder_self")]
    assert heads == [4, 2, 2]
    assert [attention.key.shape[-2] for attention in models.site_attention(model, "cross")] == [1, 1, 2]


def test_a_table_of_relative_biases_per_layer():
    model = model_of(relative_bias_per_layer=True)
    assert not hasattr(model, "encoder_bias") and not hasattr(model, "decoder_bias")
    for stack in (model.encoder[0], model.decoder[0]):
        assert stack.relative_bias.table.shape == (2, 32, 4)  # layers, buckets, heads
        assert stack.relative_bias.table.get_metadata("axes") == ("buckets", "heads")
    inputs, targets = tokens(0, 2, 6), tokens(1, 2, 7)
    expected = forward(model, inputs, targets)
    unrolled = model_of(relative_bias_per_layer=True, scan_layers=False)
    np.testing.assert_allclose(forward(unrolled, inputs, targets), expected, rtol=1e-5, atol=1e-5)
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    for decoding, chunk in ((model, 3), (model.unstacked(), 1)):
        cache, logits = decoding.init_cache(inputs, None, 9), []
        for first in range(0, 7, chunk):
            chunk_logits, cache = step(decoding, targets[:, first : first + chunk], cache)
            logits.append(chunk_logits)
        np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, rtol=1e-5, atol=1e-5)


def test_equal_tables_per_layer_are_one_table_for_the_stack():
    shared, per_layer = model_of(), model_of(1, relative_bias_per_layer=True)
    inputs, targets = tokens(0, 1, 6), tokens(1, 1, 7)
    # All parameters but the tables of `shared`, and its tables in every layer.
    values = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shared)}
    for side in ("encoder", "decoder"):
        table = values[f".{side}_bias.table.value"]
        values[f".{side}[0].relative_bias.table.value"] = jnp.stack([table, table])
    equal = jax.tree_util.tree_map_with_path(lambda path, _: values[jax.tree_util.keystr(path)], per_layer)
    expected = forward(shared, inputs, targets)
    np.testing.assert_allclose(forward(equal, inputs, targets), expected, rtol=1e-6, atol=1e-6)
    for stack in (equal.encoder[0], equal.decoder[0]):
        for layer in range(2):
            table = stack.relative_bias.table
            before = table[...]
            table.set_value(before.at[layer].add(jnp.arange(32.0)[:, None]))
            assert np.abs(forward(equal, inputs, targets) - expected).max() > 0.01
            table.set_value(before)


def test_initial_layers_do_not_depend_on_how_they_are_stacked():
    def make_layer(_, key):
        return nnx.Param(jax.random.normal(key, (2,)))

    together, apart = (init_stacks(make_layer, kinds, jax.random.key(0)) for kinds in ([4, 4, 4], [4, 2, 2]))
    drawn = [np.concatenate([stack[...] for stack in stacks]) for stacks in (together, apart)]
    np.testing.assert_array_equal(*drawn)
    assert len(np.unique(drawn[0])) == 6


def test_packed_documents_give_the_logits_of_each_alone():
    model = model_of()
    documents = [(tokens(i, 1, 5), tokens(10 + i, 1, 4)) for i in range(3)]
    pad = np.zeros((1, 2), int)
    packed = forward(
        model,
        np.concatenate([inputs for inputs, _ in documents] + [pad], axis=1),
        np.concatenate([targets for _, targets in documents] + [pad], axis=1),
        inputs_segments_BS=np.array([[1] * 5 + [2] * 5 + [3] * 5 + [0] * 2]),
        decoder_segments_BT=np.array([[1] * 4 + [2] * 4 + [3] * 4 + [0] * 2]),
    )
    for number, document in enumerate(documents):
        alone = forward(model, *document)
        np.testing.assert_allclose(packed[:, 4 * number : 4 * number + 4], alone, rtol=1e-5, atol=1e-5)


def test_padding_changes_no_logits_of_real_positions():
    model = model_of()
    inputs, targets = tokens(0, 1, 5), tokens(1, 1, 4)
    padded_inputs, padded_targets = np.pad(inputs, ((0, 0), (0, 3))), np.pad(targets, ((0, 0), (0, 2)))
    input_segments, segments = np.array([[1] * 5 + [0] * 3]), np.array([[1] * 4 + [0] * 2])
    expected = forward(model, inputs, targets)
    found = forward(model, padded_inputs, targets, inputs_segments_BS=input_segments)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    both = dict(inputs_segments_BS=input_segments, decoder_segments_BT=segments)
    found = forward(model, padded_inputs, padded_targets, **both)[:, :4]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    @jax.jit
    def decode(model):
        return model.decode_step(targets, model.init_cache(padded_inputs, input_segments, 4))[0]

    np.testing.assert_allclose(decode(model), expected, rtol=1e-5, atol=1e-5)


def test_later_targets_change_no_earlier_logits():
    model, inputs, targets = model_of(), tokens(0, 1, 5), tokens(1, 1, 4)
    changed = targets.copy()
    changed[0, 2:] = 2
    before, after = forward(model, inputs, targets), forward(model, inputs, changed)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2:] - after[:, 2:]).max() > 0.01


def test_remat_changes_no_gradients():
    inputs, targets = tokens(0, 1, 5), tokens(1, 1, 4)
    gradient = jax.jit(jax.grad(lambda model: jnp.mean(jnp.square(model(inputs, targets)))))
    expected = jax.tree.leaves(gradient(model_of(remat="none", scan_layers=True)))
    for remat, scan_layers in (("dots", True), ("full", False)):
        found = jax.tree.leaves(gradient(model_of(remat=remat, scan_layers=scan_layers)))
        for leaf, expected_leaf in zip(found, expected, strict=True):
            np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-4, atol=1e-5 * np.abs(expected_leaf).max())


def test_unknown_remat_is_refused():
    with pytest.raises(InputError, match="remat='some' is unknown; expected one of none, full, dots"):
        forward(model_of(remat="some"), tokens(0, 1, 5), tokens(1, 1, 4))


def test_dropout():
    inputs, targets = tokens(0, 1, 5), tokens(1, 1, 4)
    dropping, still = model_of(dropout_rate=0.1), model_of(dropout_rate=0.0)
    expected = forward(still, inputs, targets)
    # Without a key, or at rate zero, nothing is dropped.
    np.testing.assert_array_equal(forward(dropping, inputs, targets), expected)
    np.testing.assert_array_equal(forward(still, inputs, targets, dropout_key=jax.random.key(1)), expected)
    one, same, other = (forward(dropping, inputs, targets, dropout_key=jax.random.key(key)) for key in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - expected).max() > 0.1 and np.abs(one - other).max() > 0.1


def test_one_compilation_serves_all_models_of_an_architecture():
    once = jax.jit(lambda model, inputs, targets: model(inputs, targets))
    logits = [once(model_of(seed=seed), tokens(0, 1, 5), tokens(1, 1, 4)) for seed in range(3)]
    assert once._cache_size() == 1
    assert np.abs(logits[0] - logits[1]).max() > 0.01


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t5_1_1_small", 76_961_152),
        ("t5_1_1_base", 247_577_856),
        ("t5_1_1_large", 783_150_080),
        ("t5_1_1_xl", 2_849_757_184),
        ("t5_1_1_xxl", 11_135_332_352),
    ],
)
def test_sizes_are_those_of_the_public_checkpoints(name, expected):
    assert models.num_parameters(models.abstract(models.size(name))) == expected


def test_fewer_key_value_heads_remove_their_kernels_only():
    multi_head = models.size("t5_1_1_xxl")
    grouped = models.replace(multi_head, decoder_self_kv_heads=8, cross_kv_heads=8)
    saved = 24 * 2 * 2 * 4096 * (64 - 8) * 64  # layers, sites, k and v, D, heads, d
    counts = [models.num_parameters(models.abstract(config)) for config in (multi_head, grouped)]
    assert counts[0] - counts[1] == saved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cross_kv_heads=3), "cross_kv_heads=3 does not divide num_heads=4; nearest: 2, 4"),
        (dict(decoder_self_kv_heads=(4, 2, 1)), "decoder_self_kv_heads names 3 layers, the model has 2"),
        (dict(activation="tanh"), "activation='tanh' is unknown; expected one of gelu_new, silu, relu"),
    ],
)
def test_impossible_architectures_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
