"""What a model's cross-attention is worth: its held-out loss without it, and with another example's encoder outputs.

A conversion of heads that the model does not use cannot fail, so every result on a teacher stands beside these.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gqa.data.loader import Batches
from gqa.models import site_attention
from gqa.models.t5 import T5
from gqa.objectives.language_model import Sums, cross_entropy
from gqa.training.state import place_batch


def cross_attention_cost(model: T5, batches: Batches, mesh: Mesh) -> dict[str, float]:
    """Held-out loss in nats a token: `loss`, `loss_without_cross_attention`, `loss_with_shuffled_encoder`.

    Without: the output kernels of the cross-attention are zero. Shuffled: each row reads the encoder outputs of a row
    half the held-out set away, for rows side by side are often of one document.
    """
    without = jax.tree.map(lambda leaf: leaf, model)
    for attention in site_attention(without, "cross"):
        attention.out[...] = jnp.zeros_like(attention.out[...])

    @jax.jit
    def sums(model: T5, read: dict, batch: dict) -> Sums:
        encoded = model.encode(read["inputs"], read["inputs_segments"])
        logits = model.decode(encoded, batch["decoder_inputs"], read["inputs_segments"], batch["targets_segments"])
        return cross_entropy(logits, batch["targets"], batch["loss_weights"], 0.0)

    def shuffled(step: int) -> dict:
        batch = batches((step + len(batches) // 2) % len(batches))
        return {name: np.roll(array, len(array) // 2, axis=0) for name, array in batch.items()}

    def loss(model: T5, read: Callable[[int], dict]) -> float:
        with jax.set_mesh(mesh):
            steps = range(len(batches))
            parts = [sums(model, place_batch(mesh, read(step)), place_batch(mesh, batches(step))) for step in steps]
        parts = jax.device_get(parts)
        return float(sum(part.loss_sum for part in parts) / sum(part.weight_sum for part in parts))

    return {
        "loss": loss(model, batches),
        "loss_without_cross_attention": loss(without, batches),
        "loss_with_shuffled_encoder": loss(model, shuffled),
    }
