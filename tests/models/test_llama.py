"""Llama: packing, padding, variants, prefixes, key/value heads per layer, remat, sizes; comparisons: tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.errors import InputError
from gqa.models.stacks import num_layers

# Three layers, four query heads, two key/value heads.
CONFIG = models.replace(
    models.size("llama_mini"),
    vocab_size=40,
    d_model=16,
    num_heads=4,
    head_dim=8,
    d_ff=24,
    num_layers=3,
    decoder_self_kv_heads=2,
)

forward = jax.jit(lambda model, *tokens, **options: model(*tokens, **options))


def model_of(seed: int = 0, **changes) -> models.llama.Llama:
    """A model with random weights, norms included; drawn by numpy, which has nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype)

    return jax.tree.map(draw, models.abstract(models.replace(CONFIG, **changes)))


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, CONFIG.vocab_size, shape)


@pytest.mark.parametrize("kv_heads", [1, (4, 2, 2)])
def test_key_value_heads_per_layer_equal_the_repeated_model(kv_heads):
    model = model_of(decoder_self_kv_heads=kv_heads)
    repeated = model.unstacked()
    for stack in repeated.decoder:
        for kernel in (stack.self_attention.key, stack.self_attention.value):
            kernel.set_value(jnp.repeat(kernel[...], 4 // kernel.shape[-2], axis=-2))
        assert stack.self_attention.key.shape == (1, 16, 4, 8)
    inputs = tokens(0, 1, 6)
    np.testing.assert_allclose(forward(model, inputs), forward(repeated, inputs), rtol=1e-5, atol=1e-5)


def test_a_field_that_is_not_there():
    with pytest.raises(InputError, match="LlamaConfig has no 'num_layer'; nearest: num_layers"):
        models.replace(models.size("llama_mini"), num_layer=2)


def test_stacks_are_runs_of_equal_layers():
    model = models.abstract(models.replace(CONFIG, num_layers=6, decoder_self_kv_heads=(4, 4, 1, 2, 2, 2)))
    assert [num_layers(stack) for stack in model.decoder] == [2, 1, 3]
    assert [attention.key.shape[-2] for attention in models.site_attention(model, "decoder_self")] == [4, 1, 2]
    assert [num_layers(stack) for stack in model_of().unstacked().decoder] == [1, 1, 1]


def test_packed_documents_give_the_logits_of_each_alone():
    model = model_of()
    documents = [tokens(i, 1, 6) for i in range(3)]
    packed = forward(
        model,
        np.concatenate([*documents, np.zeros((1, 2), int)], axis=1),
        decoder_segments_BT=np.array([[1] * 6 + [2] * 6 + [3] * 6 + [0] * 2]),
    )
    for number, document in enumerate(documents):
        found = packed[:, 6 * number : 6 * number + 6]
        np.testing.assert_allclose(found, forward(model, document), rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_changes_no_logits_of_real_positions():
    model, inputs = model_of(), tokens(0, 1, 6)
    padded = forward(model, np.pad(inputs, ((0, 0), (0, 3))), decoder_segments_BT=np.array([[1] * 6 + [0] * 3]))
    np.testing.assert_allclose(padded[:, :6], forward(model, inputs), rtol=1e-5, atol=1e-5)


def test_prompts_padded_on_the_right_decode_as_each_alone():
    model, prompts, answer = model_of(), [tokens(0, 1, 6), tokens(1, 1, 4)], tokens(2, 2, 2)
    lengths = jnp.array([6, 4])

    @jax.jit
    def decode(model, prompt, answer):
        prompt_logits, cache = model.decode_step(prompt, model.init_cache(2, 9))
        return prompt_logits, model.decode_step(answer, cache._replace(index=lengths))

    padded = np.concatenate([prompts[0], np.pad(prompts[1], ((0, 0), (0, 2)))])
    prompt_logits, (answer_logits, cache) = decode(model, padded, answer)
    assert cache.index.tolist() == [8, 6]
    for row, length in enumerate(lengths):
        alone = forward(model, np.concatenate([prompts[row], answer[row : row + 1]], axis=1))
        found = np.concatenate([prompt_logits[row, :length], answer_logits[row]])
        np.testing.assert_allclose(found, alone[0], rtol=1e-4, atol=1e-5)


def test_sliding_window_forgets_what_is_further_back():
    # Three layers of a window of 2 reach 3 positions back.
    inputs, changed = tokens(0, 1, 6), tokens(0, 1, 6)
    changed[0, 0] = 1
    seen = []
    for window in (2, None):
        model = model_of(sliding_window=window)
        before, after = forward(model, inputs), forward(model, changed)
        seen.append((np.abs(before - after).max(axis=(0, 2)) > 0).tolist())
    assert seen == [[True, True, True, True, False, False], [True] * 6]


VARIANTS = [
    dict(sliding_window=3),
    dict(qkv_bias=True),
    dict(qk_norm=True),
    dict(qkv_bias=True, qk_norm=True, sliding_window=3, decoder_self_kv_heads=(4, 2, 2)),
]


@pytest.mark.parametrize(
    "changes", [*(pytest.param(one, marks=pytest.mark.full) for one in VARIANTS[:-1]), VARIANTS[-1]]
)
def test_variants_are_the_same_scanned_unrolled_and_decoded_with_a_cache(changes):
    model, inputs = model_of(**changes), tokens(0, 2, 7)
    expected = forward(model, inputs)
    plain = forward(model_of(decoder_self_kv_heads=model.config.decoder_self_kv_heads), inputs)
    assert np.abs(expected - plain).max() > 0.01
    unrolled = model_of(**changes, scan_layers=False)
    np.testing.assert_allclose(forward(unrolled, inputs), expected, rtol=1e-5, atol=1e-5)
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    for decoding, chunk in ((model, 3), (model.unstacked(), 1)):
        cache, logits = decoding.init_cache(2, 9), []
        for first in range(0, 7, chunk):
            chunk_logits, cache = step(decoding, inputs[:, first : first + chunk], cache)
            logits.append(chunk_logits)
        np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, rtol=1e-5, atol=1e-5)


def test_fewer_key_value_heads_remove_their_biases_too():
    counts = [
        models.num_parameters(models.abstract(models.replace(CONFIG, qkv_bias=True, decoder_self_kv_heads=K)))
        for K in (4, 2)
    ]
    assert counts[0] - counts[1] == 3 * 2 * (16 + 1) * 2 * 8  # layers, k and v, D and the bias, heads, d


def test_a_prefix_is_seen_by_all_of_its_row():
    model, inputs, changed = model_of(), tokens(0, 1, 6), tokens(0, 1, 6)
    changed[0, 2] = 1
    prefix = np.array([[True, True, True, False, False, False]])
    difference = np.abs(forward(model, inputs, prefix_BT=prefix) - forward(model, changed, prefix_BT=prefix))
    assert difference[0, 0].max() > 0.001
    changed = inputs.copy()
    changed[0, 4] = 1
    before, after = forward(model, inputs, prefix_BT=prefix), forward(model, changed, prefix_BT=prefix)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])


def test_remat_changes_no_gradients():
    inputs = tokens(0, 1, 6)
    gradient = jax.jit(jax.grad(lambda model: jnp.mean(jnp.square(model(inputs)))))
    expected = jax.tree.leaves(gradient(model_of(remat="none", scan_layers=True)))
    for remat, scan_layers in (("full", True), ("dots", False)):
        found = jax.tree.leaves(gradient(model_of(remat=remat, scan_layers=scan_layers)))
        for leaf, expected_leaf in zip(found, expected, strict=True):
            np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-4, atol=1e-5 * np.abs(expected_leaf).max())


def test_dropout():
    inputs, dropping = tokens(0, 1, 6), model_of(dropout_rate=0.1)
    expected = forward(dropping, inputs)
    still = forward(model_of(dropout_rate=0.0), inputs, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(still, expected)
    one, same, other = (forward(dropping, inputs, dropout_key=jax.random.key(key)) for key in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - expected).max() > 0.01 and np.abs(one - other).max() > 0.01


def test_one_compilation_serves_all_models_of_an_architecture():
    once = jax.jit(lambda model, inputs: model(inputs))
    logits = [once(model_of(seed), tokens(0, 1, 6)) for seed in range(3)]
    assert once._cache_size() == 1
    assert np.abs(logits[0] - logits[1]).max() > 0.01


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama_2_7b", 6_738_415_616),
        ("llama_2_13b", 13_015_864_320),
        ("llama_2_70b", 68_976_648_192),
        ("llama_3_8b", 8_030_261_248),
    ],
)
def test_sizes_are_those_of_the_public_checkpoints(name, expected):
    assert models.num_parameters(models.abstract(models.size(name))) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(decoder_self_kv_heads=3), "decoder_self_kv_heads=3 does not divide num_heads=4; nearest: 2, 4"),
        (dict(decoder_self_kv_heads=(4, 2)), "decoder_self_kv_heads names 2 layers, the model has 3"),
        (dict(head_dim=7), "head_dim=7 must be even for RoPE; nearest: 6, 8"),
    ],
)
def test_impossible_architectures_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
