"""What decoding in fewer bits costs in held-out loss: of the kernels, and of the keys and values in the cache."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from gqa import models
from gqa.data.loader import Batches
from gqa.models import Model
from gqa.models.quantize import quantize
from gqa.nn.cache import filled_cache
from gqa.training.loop import heldout_metrics


class _Cached(nnx.Module):
    """An attention like the one it holds, which reads its keys and values as an int8 cache gives them back."""

    def __init__(self, attention: nnx.Module):
        self.attention = attention

    def project_query(self, x_BTD):
        return self.attention.project_query(x_BTD)

    def project_key_value(self, x_BSD):
        return self.attention.project_key_value(x_BSD)

    def attend(self, query_BTHd, key_BKSd, value_BKSd, **options):
        cache = filled_cache(key_BKSd, value_BKSd, "int8")
        return self.attention.attend(query_BTHd, *cache.read(key_BKSd.dtype), **options)


def with_int8_cache(model: Model) -> Model:
    """The model as it is with keys and values in int8, whole sequences in one pass.

    Every attention that decoding keeps a cache for rounds as the cache does, keys after their rotation; an encoder has
    none and stays as it is. The result is for `models.apply`, not for decoding.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for site in models.FAMILIES[models.family_of(model.config)].sites:
        if site != "encoder_self":
            stacks, name = models.site_stacks(model, site)
            for stack in stacks:
                setattr(stack, name, _Cached(getattr(stack, name)))
    return model


def quantized_losses(
    model: Model, batches: Batches, mesh: Mesh, *, int8_cache: bool, weights: Sequence[str]
) -> dict[str, float]:
    """Held-out loss in nats a token by what is in fewer bits: `cache int8`, `weights int8`, `weights int4`.

    `weights` are names in `gqa.models.quantize.WEIGHTS`; raises `InputError` for others.
    """
    losses = {}
    if int8_cache:
        losses["cache int8"] = heldout_metrics(with_int8_cache(model), batches, mesh, show_progress=True)["loss"]
    for name in weights:
        quantized = heldout_metrics(quantize(model, name), batches, mesh, show_progress=True)
        losses[f"weights {name}"] = quantized["loss"]
    return losses


def loss_table(loss: float, losses: dict[str, float]) -> str:
    """The losses beside that of the model as it is, as a Markdown table."""
    lines = ["| in fewer bits | held-out loss | difference, nats |", "|---|--:|--:|", f"| nothing | {loss:.4f} | |"]
    return "\n".join(lines + [f"| {name} | {each:.4f} | {each - loss:+.4f} |" for name, each in losses.items()])
