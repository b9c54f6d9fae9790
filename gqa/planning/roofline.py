"""How fast a program can be at best: the slowest of arithmetic, memory and interconnect, each at its peak."""

from collections.abc import Sequence
from typing import Any

from gqa.planning.chips import Topology
from gqa.planning.hlo import Collective

NAMES = {"compute": "compute", "memory": "HBM", "interconnect": "ICI"}


def collective_seconds(collectives: Sequence[Collective], topology: Topology) -> float | None:
    """Time of all collectives at the links' bandwidth; a permutation uses both directions of one dimension."""
    bandwidth = topology.chip.link_bandwidth
    if bandwidth is None:
        return None
    return sum(
        each.sent / bandwidth / (2 if each.kind == "collective-permute" else topology.links(each.group))
        for each in collectives
    )


def times(topology: Topology, *, flops: float, traffic: float, collectives: Sequence[Collective]) -> dict[str, Any]:
    """Seconds of each resource for one step of one device, and of the step: at best (all overlap) and one by one.

    Without the chip's figures (a CPU) the values are `None`.
    """
    chip = topology.chip
    if chip.bf16_flops is None:
        return dict.fromkeys(("compute", "memory", "interconnect", "step", "without_overlap", "binds"))
    parts = {
        "compute": flops / chip.bf16_flops,
        "memory": traffic / chip.hbm_bandwidth,
        "interconnect": collective_seconds(collectives, topology),
    }
    binds = max(parts, key=parts.get)
    return parts | {"step": parts[binds], "without_overlap": sum(parts.values()), "binds": NAMES[binds]}


def utilisation(model_flops: float, topology: Topology, seconds: float | None) -> float | None:
    """Model FLOPs utilisation of a step of all devices."""
    if not seconds:
        return None
    return model_flops / seconds / topology.num_devices / topology.chip.bf16_flops


def cost(topology: Topology, seconds: float | None, price: float | None) -> dict[str, float | None]:
    """Hours, chip-hours and USD of `seconds` of all devices."""
    if seconds is None:
        return {"hours": None, "chip_hours": None, "usd": None}
    hours = seconds / 3600
    chip_hours = hours * topology.num_devices
    return {"hours": hours, "chip_hours": chip_hours, "usd": None if price is None else chip_hours * price}
