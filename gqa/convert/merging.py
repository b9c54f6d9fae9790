"""Gradual merging: uptraining starts from the unconverted heads and moves them to their group's mean step by step."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gqa import models
from gqa.convert.pooling import grouped


def merge_gradually(model: models.Model, kv_heads: Mapping[str, int], share: jax.Array) -> models.Model:
    """The model with each key and value head moved by `share` of the way to the mean of its group.

    `k_h ← (1 - share) k_h + share k_shared` (DHA, arXiv 2406.06567). At share 1 it computes what `convert` by `mean`
    gives, in the shapes of the unconverted model.

    Args:
      model: with more heads than `kv_heads`, which divides them; other parameters are the same arrays.
      kv_heads: site -> heads to end with.
      share: scalar in [0, 1].
    """

    def moved(parameter, num_kv_heads: int):
        heads = grouped(parameter[...], num_kv_heads)
        shared = jnp.mean(heads, axis=-2, keepdims=True)
        return parameter.replace((heads + share * (shared - heads)).reshape(parameter.shape).astype(parameter.dtype))

    model = jax.tree.map(lambda leaf: leaf, model)
    for site, num_kv_heads in kv_heads.items():
        for attention in models.site_attention(model, site):
            for name in ("key", "value", "key_bias", "value_bias"):
                if hasattr(attention, name):
                    setattr(attention, name, moved(getattr(attention, name), num_kv_heads))
    return model
