"""Activations on their way: what a conversion computed of a layer's heads is used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.convert import walk
from gqa.convert.plan import with_attention

SIZES = {"t5": "t5_1_1_mini", "llama": "llama_mini"}


@pytest.mark.parametrize("case", ["t5", "llama"])
def test_sums_of_a_model_in_bfloat16_are_in_float32(case, random_model, rows):
    """In bfloat16 a fit would miss several times what it says: products of a batch are rounded to three digits."""
    model = random_model(models.replace(models.size(f"{SIZES[case]}"), dtype="bfloat16", vocab_size=256))
    shell, load_layer = walk.shell_of(model), walk.layers_of(model)
    side, name = "decoder", "self_attention"
    encoded = None
    if case == "t5":
        stream = walk.Stream(shell, "encoder", rows, None)
        for number in range(walk.num_layers(model.config, "encoder")):
            stream.advance(load_layer("encoder", number))
        encoded = stream.encoded()
    layer = load_layer(side, 0)
    stream = walk.Stream(shell, side, rows, encoded)
    output = np.concatenate(
        [
            np.asarray(recorder.output, np.float64)[batch["targets_segments"] > 0]
            for arguments, batch in zip(stream.arguments((layer,)), rows, strict=True)
            for recorder in walk.recorded(*arguments, side, {name: layer.self_attention})[1]
        ]
    )
    sums = stream.fit_sums(layer, layer.self_attention, name)
    np.testing.assert_allclose(sums.yy, np.sum(output * output), rtol=1e-3)
    assert sums.missed == 0
    heads = np.asarray(layer.self_attention.out[...], np.float64).reshape(len(sums.zz), -1)
    np.testing.assert_allclose(np.vdot(heads, sums.zz @ heads), sums.yy, rtol=2e-2)
    assert not np.array_equal(sums.zz.astype(jnp.bfloat16), sums.zz)


@pytest.mark.parametrize("case", ["t5", "llama"])
def test_heads_that_were_computed_take_the_activations_as_far(case, teacher, rows):
    """With another output kernel than the sums were taken with, as the refit gives; the second layer starts anew."""
    model = teacher(case)
    attentions = walk.sides(model.config)["decoder"].values()
    encoded = None
    if case == "t5":
        stream = walk.Stream(walk.shell_of(model), "encoder", rows, None)
        stream.advance(walk.layers_of(model)("encoder", 0))
        encoded = stream.encoded()
    once, again = (walk.Stream(walk.shell_of(model), "decoder", rows, encoded) for _ in range(2))
    before = [np.asarray(x) for _, _, x, *_ in once.arguments((None,))]
    for number in range(2):
        layer = walk.layers_of(model)("decoder", number)
        for name in attentions:
            attention = jax.tree.map(lambda leaf: 1.5 * leaf, getattr(layer, name))
            once.fit_sums(layer, attention, name)
            attention.out = attention.out.replace(2 * attention.out[...])
            layer = with_attention(layer, name, attention)
        once.advance(layer)
        again.advance(layer)
    pairs = zip(once.arguments((None,)), again.arguments((None,)), before, strict=True)
    for (_, _, found, *_), (_, _, expected, *_), start in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(np.asarray(found) - start).max() > 0.1
