"""What a conversion will do before it does it: how many heads each layer gets, and which heads share."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gqa import models
from gqa.convert import budget
from gqa.convert.grouping import best_order, group_energy, pair_energies, scored_by_pairs
from gqa.convert.heads import Moments, read_heads, write_heads
from gqa.convert.statistics import Statistics, assumed
from gqa.convert.walk import LoadLayer, check_finite, sides
from gqa.errors import InputError
from gqa.models.heads import divisors


class Plan(NamedTuple):
    """Sizes, and which heads share."""

    config: models.ModelConfig  # after the conversion
    orders: dict[str, np.ndarray]  # path of an attention -> order of its present units; left out: as they are


def is_rotary(config: models.ModelConfig) -> bool:
    """Whether queries and keys are turned by their position."""
    return isinstance(config, models.llama.LlamaConfig)


def check_one_order(config: models.ModelConfig, sites: Iterable[str]) -> None:
    """Raises `InputError` where heads of one of `sites` cannot be grouped: one order is for layers of one size."""
    for site in sites:
        present = config.kv_heads(site)
        if _shares_bias(config, site) and len(set(present)) > 1:
            raise InputError(
                f"group: the layers of {site} share a bias table but have {present} key/value heads; leave group out"
            )


def make_plan(
    shell: models.Model,
    load_layer: LoadLayer,
    new_config: models.ModelConfig,
    statistics: Statistics | None,
) -> Plan:
    """Chooses which heads share, in one order for layers that share a bias table.

    `load_layer` is asked for all layers that change; `statistics` `None`: moments are assumed. `check_one_order` holds.
    """
    config, orders = shell.config, {}
    for side, attentions in sides(config).items():
        for site, name in attentions.items():
            before, after = config.kv_heads(site), new_config.kv_heads(site)
            if before == after:
                continue
            shared = _shares_bias(config, site)
            sizes = [present // wanted for present, wanted in zip(before, after, strict=True)]
            energies = []
            for number, (present, size) in enumerate(zip(before, sizes, strict=True)):
                if size == 1 and not shared:
                    continue
                layer = load_layer(side, number)
                moments = moments_of(shell, layer, site, name, number, statistics)
                energy = group_energy(read_heads(getattr(layer, name)), moments, is_rotary(config))
                if not shared:
                    orders[models.site_path(site, number)] = best_order([energy], [size], present)
                elif scored_by_pairs(present, sizes):  # of large layers numbers are kept, not matrices
                    energies.append(pair_energies(energy, present))
                else:
                    energies.append(energy)
            if shared:
                paths = [models.site_path(site, number) for number in range(len(before))]
                orders |= dict.fromkeys(paths, best_order(energies, sizes, before[0]))
    return Plan(new_config, orders)


def plan_budget(
    shell: models.Model, load_layer: LoadLayer, heads: int, sites: Sequence[str], statistics: Statistics | None
) -> dict[str, tuple[int, ...]]:
    """Key/value heads by site and layer, `heads` in all, where they keep the most energy (neighbours share)."""
    lost = {}
    for side, attentions in sides(shell.config).items():
        for site, name in attentions.items():
            if site not in sites:
                continue
            for number, present in enumerate(shell.config.kv_heads(site)):
                layer = load_layer(side, number)
                moments = moments_of(shell, layer, site, name, number, statistics)
                energy = group_energy(read_heads(getattr(layer, name)), moments, is_rotary(shell.config))

                def kept(wanted: int, present=present, energy=energy) -> float:
                    size = present // wanted
                    return sum(energy(tuple(range(first, first + size))) for first in range(0, present, size))

                lost[site, number] = {wanted: -kept(wanted) for wanted in divisors(present)}
    chosen = budget.spend(heads, lost)
    return {site: tuple(chosen[site, number] for number in range(len(shell.config.kv_heads(site)))) for site in sites}


def permuted_shell(shell: models.Model, plan: Plan) -> models.Model:
    """The shell of the new model: its configuration, and bias tables with their columns in the new order."""
    shell = jax.tree.map(lambda leaf: leaf, shell)
    for site, table in (("encoder_self", "encoder_bias"), ("decoder_self", "decoder_bias")):
        path = models.site_path(site, 0)
        if path in plan.orders and _shares_bias(shell.config, site):
            setattr(shell, table, _permuted_bias(getattr(shell, table), plan.orders[path]))
    shell.config = plan.config
    return shell


def permuted_layer(layer, site: str, name: str, order: np.ndarray):
    """A layer with the units of attention `name` in another order; a bias table of its own goes along."""
    layer = with_attention(
        layer, name, write_heads(getattr(layer, name), read_heads(getattr(layer, name)).permuted(order))
    )
    if site != "cross" and hasattr(layer, "relative_bias"):
        layer.relative_bias = _permuted_bias(layer.relative_bias, order)
    return layer


def with_attention(layer, name: str, attention):
    """A copy of the layer with another attention called `name`."""
    layer = jax.tree.map(lambda leaf: leaf, layer)
    setattr(layer, name, attention)
    return layer


def moments_of(shell, layer, site: str, name: str, number: int, statistics: Statistics | None) -> Moments:
    """Measured moments of an attention, or assumed ones where there are no statistics.

    Raises `InputError` for an attention whose weights are not finite.
    """
    path = models.site_path(site, number)
    moments = assumed(shell, layer, site, name) if statistics is None else statistics.moments(path)
    for array in (moments.query, moments.key_value, *jax.tree.leaves(getattr(layer, name))):
        check_finite(np.asarray(array), f"weights of {path}")
    return moments


def _shares_bias(config: models.ModelConfig, site: str) -> bool:
    return isinstance(config, models.t5.T5Config) and site != "cross" and not config.relative_bias_per_layer


def _permuted_bias(bias, order: np.ndarray):
    bias = jax.tree.map(lambda leaf: leaf, bias)
    buckets, H = bias.table.shape
    columns = np.asarray(bias.table[...]).reshape(buckets, len(order), -1)[:, order]
    bias.table = bias.table.replace(columns.reshape(buckets, H))
    return bias
