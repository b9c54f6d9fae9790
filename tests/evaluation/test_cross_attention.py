"""The cost of losing the cross-attention against the models that have lost it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.data import loader
from gqa.evaluation.cross_attention import cross_attention_cost
from gqa.sharding import make_mesh
from gqa.training.loop import heldout_metrics


@pytest.fixture(scope="module")
def setting(tiny_run, tiny_records):
    """A T5 whose cross-attention matters, held-out batches of 4 rows, and a mesh."""
    config = tiny_run("t5")
    model = models.create(config.model.architecture(), jax.random.key(1))
    for attention in models.site_attention(model, "cross"):
        attention.out[...] = 4 * attention.out[...]
    batches = loader.heldout_batches(tiny_records("span_corruption"), 4, 12)
    return model, batches, make_mesh(config.mesh)


def nats_per_token(model, batches, inputs_of=None) -> float:
    """The loss from log-probabilities looked up one by one, in float64."""
    loss = weight = 0.0
    for step in range(len(batches)):
        batch = batches(step) if inputs_of is None else batches(step) | inputs_of(batches, step)
        logits = np.asarray(models.apply(model, batch), np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        of_target = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        loss += ((log_z - of_target) * batch["loss_weights"]).sum()
        weight += batch["loss_weights"].sum()
    return loss / weight


def without_cross_attention(model):
    """The model with its cross-attentions' output kernels, `decoder[i].cross_attention.out`, set to zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if ".cross_attention.out." in jax.tree_util.keystr(path) else leaf, model
    )


def shuffled(batches, step):
    """The inputs of the rows half of the held-out set and half a batch away."""
    other = batches((step + len(batches) // 2) % len(batches))
    order = [2, 3, 0, 1]
    return {name: other[name][order] for name in ("inputs", "inputs_segments")}


def test_the_three_losses(setting):
    model, batches, mesh = setting
    before = [np.array(leaf) for leaf in jax.tree.leaves(model)]
    cost = cross_attention_cost(model, batches, mesh)
    assert cost == pytest.approx(
        {
            "loss": nats_per_token(model, batches),
            "loss_without_cross_attention": nats_per_token(without_cross_attention(model), batches),
            "loss_with_shuffled_encoder": nats_per_token(model, batches, shuffled),
        },
        rel=1e-5,
    )
    assert cost["loss"] == pytest.approx(heldout_metrics(model, batches, mesh)["loss"], rel=1e-6)
    assert abs(cost["loss_without_cross_attention"] - cost["loss"]) > 1e-2
    assert abs(cost["loss_with_shuffled_encoder"] - cost["loss"]) > 1e-3
    for leaf, value in zip(jax.tree.leaves(model), before, strict=True):
        np.testing.assert_array_equal(leaf, value)


def test_a_model_that_does_not_look_loses_nothing(setting):
    model, batches, mesh = setting
    losses = cross_attention_cost(without_cross_attention(model), batches, mesh)
    assert len(losses) == 3
    assert np.ptp(list(losses.values())) < 1e-6
    assert jnp.isfinite(losses["loss"])
