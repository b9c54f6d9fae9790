"""What the attentions of a model put out, seen from outside: each is replaced by one that also notes its output."""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from gqa import models
from gqa.models import Model


class _Noting(nnx.Module):
    """An attention like the one it holds, which hands its output to `note` while it is traced."""

    def __init__(self, attention: nnx.Module, note: Callable[[jax.Array], None]):
        self.attention = attention
        self.note = note

    def project_query(self, x_BTD):
        return self.attention.project_query(x_BTD)

    def project_key_value(self, x_BSD):
        return self.attention.project_key_value(x_BSD)

    def attend(self, *arguments, **options):
        out_BTD = self.attention.attend(*arguments, **options)
        self.note(out_BTD)
        return out_BTD


def attention_outputs(
    model: Model, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, list[jax.Array]]]:
    """Logits `[B, T, V]`, and for each attention site the output `[B, T, D]` of every layer, after its output kernel.

    A pure function, to be called under `jax.jit`. The layers are unrolled, since what a scan sees cannot leave it.

    Args:
      model: of any family, stacked or not.
      batch, dropout_key: as of `gqa.models.apply`.
    """
    model = model.unstacked()
    model.config = models.replace(model.config, scan_layers=False, remat="none")
    outputs: dict[str, list[jax.Array]] = {}
    for site in models.FAMILIES[models.family_of(model.config)].sites:
        outputs[site] = []
        stacks, name = models.site_stacks(model, site)
        for stack in stacks:
            setattr(stack, name, _Noting(getattr(stack, name), outputs[site].append))
    return models.apply(model, batch, dropout_key), outputs
