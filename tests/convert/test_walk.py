"""Activations on their way: what a conversion computed of a layer's heads is used again."""

import jax
import numpy as np
import pytest

from gqa.convert import walk
from gqa.convert.plan import with_attention


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
