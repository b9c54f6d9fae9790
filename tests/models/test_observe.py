"""Observing changes nothing, and what is observed is what the layers computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.models.observe import attention_outputs

B, T = 2, 6


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(1, 256, (B, T)) for name in ("inputs", "decoder_inputs")}
    return tokens | {name: np.ones((B, T), np.int32) for name in ("inputs_segments", "targets_segments")}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("t5_1_1_mini", dict(decoder_self_kv_heads=(4, 2), cross_kv_heads=1, num_encoder_layers=3)),
        ("llama_mini", dict(num_layers=3, decoder_self_kv_heads=2, remat="full")),
    ],
)
def test_outputs_of_every_site_and_layer(size, changes, random_model, batch):
    model = random_model(models.replace(models.size(size), **changes))

    @jax.jit
    def observe(model):
        """With the output kernels of the last layer of each site zero: that layer's output is known."""
        without = jax.tree.map(lambda leaf: leaf, model)
        for site in models.FAMILIES[models.family_of(model.config)].sites:
            out = models.site_attention(without, site)[-1].out
            out[...] = out[...].at[-1].set(0)
        return models.apply(model, batch), attention_outputs(model, batch), attention_outputs(without, batch)

    logits, (observed_logits, outputs), (_, without) = observe(model)
    np.testing.assert_allclose(observed_logits, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    layers = {site: len(model.config.kv_heads(site)) for site in outputs}
    assert {site: len(found) for site, found in outputs.items()} == layers
    assert outputs.keys() == set(models.FAMILIES[models.family_of(model.config)].sites)
    for site, found in outputs.items():
        assert all(output.shape == (B, T, 64) and jnp.any(output != 0) for output in found)
        assert not np.any(without[site][-1])
    first = models.FAMILIES[models.family_of(model.config)].sites[0]  # nothing before it differs
    for one, other in zip(outputs[first][:-1], without[first][:-1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_first_layer_by_hand(random_model, batch):
    """One head's width of one layer, without position: the softmax average of the values, through the output kernel."""
    model = random_model(
        models.replace(
            models.size("t5_1_1_mini"), num_heads=2, encoder_self_kv_heads=1, decoder_self_kv_heads=1, cross_kv_heads=1
        )
    )
    _, outputs = jax.jit(attention_outputs)(model, batch)
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), model.encoder[0])
    hidden = np.asarray(model.embedding[...], np.float64)[batch["inputs"]]
    hidden /= np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
    hidden *= layer.self_attention_norm.scale[...]
    query, key, value = (
        np.einsum("BTD,DHd->BHTd", hidden, kernel[...])
        for kernel in (layer.self_attention.query, layer.self_attention.key, layer.self_attention.value)
    )
    scores = query @ key.swapaxes(-1, -2) + np.asarray(model.encoder_bias(T, T, 0), np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    heads = weights / weights.sum(-1, keepdims=True) @ value
    expected = np.einsum("BHTd,HdD->BTD", heads, layer.self_attention.out[...])
    np.testing.assert_allclose(outputs["encoder_self"][0], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
