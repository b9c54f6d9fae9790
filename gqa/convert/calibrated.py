"""Conversions that look at what heads do on text: keys and values of least error, grouping, refit, budgets.

A method is spelled `base+step+step`, such as `svd+group+refit`; the steps are taken in the order of `STEPS` below.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg
from flax import nnx
from tqdm import tqdm

from gqa import models
from gqa.convert import pooling, procrustes, svd, tuning
from gqa.convert.heads import Heads, Moments, read_heads, with_out, write_heads
from gqa.convert.plan import (
    Plan,
    check_one_order,
    is_rotary,
    moments_of,
    permuted_layer,
    permuted_shell,
    with_attention,
)
from gqa.convert.statistics import Statistics
from gqa.convert.walk import FitSums, LoadLayer, Stream, num_all_layers, num_layers, sides
from gqa.errors import InputError

POOLED: dict[str, Callable] = {"mean": pooling.mean, "first": pooling.first, "random": pooling.random}
# Bases beside the pooled ones: whether they change keys in a way that norms of keys do not allow.
BASES = {"procrustes": True, "svd": True, "svd_values": False}
STEPS = ("group", "renorm", "tune", "refit")
DEAD = 1e-12  # of the largest energy of a unit
RESOLVED = 1e-6  # of the outputs' energy: what sums in float32 tell from nothing
RIDGE = 1e-3  # of the refit, relative to the mean square of a head output; more where there are few tokens


@dataclasses.dataclass(frozen=True)
class Method:
    """A base with its steps."""

    base: str
    group: bool  # first choose which heads share
    renorm: bool  # give means of heads the heads' own norm
    tune: bool  # train the attention's kernels so that its output is the teacher's
    refit: bool  # last fit W_O so that the attention's output is the teacher's

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Of `svd+group+refit`; raises `InputError` for what is unknown or does not go together."""
        base, *steps = text.split("+")
        known = [*POOLED, *BASES]
        if base not in known:
            raise InputError(f"method={text!r} is unknown; expected one of {', '.join(known)}, with {_plus(STEPS)}")
        for step in steps:
            if step not in STEPS or steps.count(step) > 1:
                raise InputError(f"method={text!r} has the step {step!r}; expected each of {_plus(STEPS)} once at most")
        if "renorm" in steps and base not in ("mean", "procrustes"):
            raise InputError(f"method={text!r}: renorm is for means of heads; nearest: mean+renorm, procrustes+renorm")
        return cls(base, *(step in steps for step in STEPS))

    @property
    def calibrated(self) -> bool:
        """Whether it needs more than the attention's own kernels."""
        return self.base in BASES or self.group or self.renorm or self.tune or self.refit

    def check(self, config: models.ModelConfig, sites: Iterable[str], has_text: bool) -> None:
        """Raises `InputError` where the architecture or the lack of text forbids to change `sites` so."""
        for step in ("tune", "refit"):
            if getattr(self, step) and not has_text:
                raise InputError(f"{step} fits outputs on text; give some to calibrate on, or leave {step} out")
        if BASES.get(self.base, False) and getattr(config, "qk_norm", False):
            raise InputError(
                f"method {self.base} changes the basis of keys, which this model's norms of keys do not allow; "
                "nearest: svd_values (keys by their mean), mean+refit"
            )
        if self.group:
            check_one_order(config, sites)


def _plus(steps: Sequence[str]) -> str:
    return ", ".join(f"+{step}" for step in steps)


class Converted(NamedTuple):
    """One layer after its conversion."""

    side: str
    number: int
    layer: nnx.Module
    report: list[dict[str, Any]]  # for each converted site what was kept


def convert_layers(
    shell: models.Model,
    load_layer: LoadLayer,
    plan: Plan,
    method: Method,
    *,
    batches: Sequence[Mapping] | None,
    statistics: Statistics | None,
    key: jax.Array,
) -> Iterator[Converted]:
    """The layers of the new model in order, each converted on what the converted layers before it give.

    Args:
      shell: the old model without its layers.
      load_layer: gives its layers, each asked for once, in order.
      plan: of `make_plan`.
      method: what to do.
      batches: calibration rows, for the attention-output errors and the refit; `None`: neither.
      statistics: of the same model; `None`: moments are assumed from its norms.
      key: random key of the base `random`.
    """
    config, new_shell = shell.config, permuted_shell(shell, plan)
    # Rows pass the layers given, whatever the number of heads: so the programs that calibrated are used again.
    new_shell.config = config
    encoded = statistics.encoded(batches) if statistics and not _changes_encoder(config, plan) else None
    last = list(sides(config))[-1], num_layers(config, list(sides(config))[-1]) - 1  # nothing reads what it gives
    with tqdm(total=num_all_layers(config), desc="convert", unit="layer", delay=1) as bar:
        for side, attentions in sides(config).items():
            known = side == "encoder" and encoded is not None
            stream = Stream(new_shell, side, batches, encoded) if batches and not known else None
            for number in range(num_layers(config, side)):
                layer = load_layer(side, number)
                report = []
                for site, name in attentions.items():
                    path = models.site_path(site, number)
                    if path in plan.orders:
                        layer = permuted_layer(layer, site, name, plan.orders[path])
                    wanted = plan.config.kv_heads(site)[number]
                    if wanted == config.kv_heads(site)[number]:
                        continue
                    moments = moments_of(shell, layer, site, name, number, statistics)
                    layer_key = pooling.layer_keys(config, site, key)[number]
                    layer, found = _convert(layer, name, wanted, method, moments, stream, layer_key, is_rotary(config))
                    order = plan.orders.get(path, np.arange(config.kv_heads(site)[number]))
                    groups = order.reshape(wanted, -1).tolist()
                    if "dead_heads" in found:
                        found["dead_heads"] = sorted(order[found["dead_heads"]].tolist())
                    report.append({"site": site, "layer": number, "kv_heads": wanted, "groups": groups} | found)
                if stream and (side, number) != last:
                    stream.advance(layer)
                bar.update()
                yield Converted(side, number, layer, report)
            if side == "encoder" and stream:
                encoded = stream.encoded()


def _changes_encoder(config: models.ModelConfig, plan: Plan) -> bool:
    sites = sides(config).get("encoder", ())
    reordered = any(path.startswith("encoder.") for path in plan.orders)
    return reordered or any(plan.config.kv_heads(site) != config.kv_heads(site) for site in sites)


def _convert(
    layer: nnx.Module, name: str, wanted: int, method: Method, moments: Moments, stream, key: jax.Array, rotary: bool
) -> tuple[nnx.Module, dict[str, Any]]:
    """The layer with the attention `name` converted, and what was kept."""
    before = getattr(layer, name)
    heads = read_heads(before)
    found: dict[str, Any] = {}
    if method.base in POOLED:
        new_heads = read_heads(POOLED[method.base](before, None, wanted, key))
    else:
        new_heads, found = _rebased(heads, moments, wanted, method.base, rotary)
    if method.renorm:
        new_heads = procrustes.restore_norm(new_heads, heads, moments)
    if dead := _dead(heads):
        found["dead_heads"] = dead
    # Its number of heads comes with the kernels.
    attention = write_heads(before, new_heads)
    del heads, new_heads  # a gigabyte at the widths of an 11B model, which the programs below want
    if stream:
        sums = stream.fit_sums(layer, attention, name)
        found["output_error"] = sums.error(sums.missed)
        if method.tune:
            attention = tuning.tune(stream, layer, attention, name)
            sums = stream.fit_sums(layer, attention, name)
            found["output_error_before_tune"] = found["output_error"]
            found["output_error"] = sums.error(sums.missed)
        if method.refit:
            out, missed = _refit(sums, np.asarray(attention.out[...], np.float64))
            attention = with_out(attention, out)
            found["output_error_before_refit"] = found["output_error"]
            found["output_error"] = sums.error(missed)
    return with_attention(layer, name, attention), found


def _rebased(heads: Heads, moments: Moments, wanted: int, base: str, rotary: bool) -> tuple[Heads, dict[str, Any]]:
    """The heads of a base that changes their basis, and the energy they keep."""
    if base == "procrustes":
        return procrustes.mean(procrustes.align(heads, moments, wanted, rotary), wanted), {}
    values = svd.value_basis(heads, moments, wanted)
    value, out = svd.share_values(heads, values)
    found = {"value_energy_kept": _share(values)}
    if base == "svd_values":
        return procrustes.mean(heads, wanted)._replace(value=value, out=out), found
    keys = svd.key_basis(heads, moments, wanted, rotary)
    key, query = svd.share_keys(heads, keys)
    return Heads(query, key, value, out), {"key_energy_kept": _share(keys)} | found


def _share(basis: svd.Basis) -> float:
    total = basis.total.sum()
    return min(float(basis.kept.sum() / total), 1.0) if total > 0 else 1.0


def _dead(heads: Heads) -> list[int]:
    """Units whose values or outputs are next to nothing, whatever they read: `‖W_V W_O‖²` summed over query heads.

    A unit without queries or keys is none of them: it reads the mean of its values.
    """
    values = heads.value.transpose(1, 2, 0) @ heads.value.transpose(1, 0, 2)  # [K, d, d]
    energy = np.sum(values * svd.out_energy(heads), axis=(1, 2))
    return np.flatnonzero(energy <= DEAD * energy.max()).tolist()


def _refit(sums: FitSums, out: np.ndarray) -> tuple[np.ndarray, float]:
    """`argmin ‖Z W - Y‖² + λ ‖W - W_O‖²` around the kernel `out` `[H, d, D]`, and its `‖Z W - Y‖²`."""
    size = len(sums.zz)
    # As many tokens as dimensions fit anything: with λ of 1e-3 the fit made new text worse up to 6 tokens for each.
    ridge = max(RIDGE, size / max(sums.tokens, 1)) * np.trace(sums.zz) / size
    if ridge <= 0:  # all outputs are zero
        return out, sums.missed
    system, kernel = sums.zz.copy(), out.reshape(size, -1)
    system[np.diag_indices(size)] += ridge
    factor = scipy.linalg.cho_factor(system, lower=True, overwrite_a=True)
    fitted = scipy.linalg.cho_solve(factor, sums.zy + ridge * kernel, overwrite_b=True)
    # ‖Z W‖² = ⟨W, Zᵀ Y + λ (W_O - W)⟩ is what the equations say of the solution.
    missed = float(sums.yy - np.vdot(sums.zy, fitted) + ridge * np.vdot(fitted, kernel - fitted))
    if missed < RESOLVED * sums.yy:
        missed = min(missed, sums.missed)
    return fitted.reshape(out.shape), missed
