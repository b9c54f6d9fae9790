"""What the tools print about a model: its key/value heads, its parameters, its cache, in aligned columns."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from gqa import models

# What a token of the cache belongs to, by site; the encoder keeps none.
CACHED = {"decoder_self": "target", "cross": "input"}


def sites(config: models.ModelConfig) -> tuple[str, ...]:
    """The attention sites of a model."""
    return models.FAMILIES[models.family_of(config)].sites


def heads(per_layer: Sequence[int]) -> str:
    """Key/value heads of a site's layers: `8`, or `8,8,4` where they differ."""
    return ",".join(map(str, per_layer if len(set(per_layer)) > 1 else per_layer[:1]))


def site_parameters(model: models.Model, site: str) -> int:
    """Parameters of all attentions at `site`."""
    return sum(leaf.size for leaf in jax.tree.leaves(models.site_attention(model, site)))


def cache_bytes(config: models.ModelConfig, site: str, dtype: str) -> int:
    """Bytes that a token of one sequence adds to the cache of `site`: a key and a value in every layer."""
    return 2 * sum(config.kv_heads(site)) * config.head_dim * jnp.dtype(dtype).itemsize if site in CACHED else 0


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows as lines, their cells one under the other."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
