"""What a model's cross-attention is worth: its held-out loss without it, and with another example's encoder outputs.

A conversion of heads that the model does not use cannot fail, so every result on a teacher stands beside these.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gqa.data.loader import Batches
from gqa.models import site_attention
from gqa.models.t5 import T5
from gqa.objectives.language_model import Sums, cross_entropy
from gqa.training.state import place_batch


def cross_attention_cost(model: T5, batches: Batches, mesh: Mesh) -> dict[str, float]:
    """Held-out loss in nats a token: `loss`, `loss_without_cross_attention`, `loss_with_shuffled_encoder`.

    Without: the output kernels of the cross-attention are zero. Shuffled: each row reads the encoder outputs of the
    row before it in the batch.
    """
    without = jax.tree.map(lambda leaf: leaf, model)
    for attention in site_attention(without, "cross"):
        attention.out[...] = jnp.zeros_like(attention.out[...])

    @jax.jit
    def sums(model: T5, batch: dict, shift: jax.Array) -> Sums:
        segments = jnp.roll(batch["inputs_segments"], shift, axis=0)
        encoded = jnp.roll(model.encode(batch["inputs"], batch["inputs_segments"]), shift, axis=0)
        logits = model.decode(encoded, batch["decoder_inputs"], segments, batch["targets_segments"])
        return cross_entropy(logits, batch["targets"], batch["loss_weights"], 0.0)

    def loss(model: T5, shift: int) -> float:
        with jax.set_mesh(mesh):
            parts = [sums(model, place_batch(mesh, batches(i)), jnp.int32(shift)) for i in range(len(batches))]
        parts = jax.device_get(parts)
        return float(sum(part.loss_sum for part in parts) / sum(part.weight_sum for part in parts))

    return {
        "loss": loss(model, 0),
        "loss_without_cross_attention": loss(without, 0),
        "loss_with_shuffled_encoder": loss(model, 1),
    }
