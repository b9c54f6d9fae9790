"""Meshes, micro-batches and remat policies for a run: ranked by estimate, the best confirmed by the compiler."""

import math
from collections.abc import Iterator

from gqa import models
from gqa.errors import InputError
from gqa.models.heads import divisors
from gqa.models.stacks import REMAT_POLICIES
from gqa.planning import train
from gqa.planning.chips import Topology
from gqa.planning.programs import batch_shapes
from gqa.sharding import MeshConfig, describe_mesh
from gqa.training.config import RunConfig

MARGIN = 0.9  # share of the memory that an estimate may fill: it is within a fifth
LARGEST_TENSOR = 16  # beyond, every layer waits for sums over more than one host's chips
CONFIRMED = 3  # candidates that are compiled at most


def candidates(
    config: RunConfig, architecture: models.ModelConfig, topology: Topology, price: float | None
) -> list[train.Plan]:
    """Estimated plans of all variants of a run, those that fit first, then by time of a step (or by memory).

    Raises `InputError` for runs that no mesh makes right.
    """
    train.check_covered(config)
    batch_shapes(config, architecture)
    plans = []
    for mesh, accumulation, remat in _variants(config, architecture, topology):
        changed, model = train.variant(config, architecture, mesh=mesh, accumulation=accumulation, remat=remat)
        plans.append(train.estimate(changed, model, topology, price))
    return sorted(plans, key=lambda plan: (not _probably_fits(plan), _rank(plan)))


def _rank(plan: train.Plan) -> float:
    if not _probably_fits(plan):
        return plan["memory"]["total"]
    return plan["seconds"]["without_overlap"] or plan["memory"]["total"]


def _probably_fits(plan: train.Plan) -> bool:
    limit = plan["memory"]["limit"]
    return limit is None or plan["memory"]["total"] <= MARGIN * limit


def _variants(config, architecture, topology) -> Iterator[tuple[MeshConfig, int, str]]:
    n, rows = topology.num_devices, config.train.batch_size
    for tensor in _tensor_sizes(architecture, topology):
        for fsdp in divisors(n // tensor):
            ways = n // tensor
            if rows % ways:
                continue
            for accumulation in divisors(rows // ways):
                if accumulation & (accumulation - 1) == 0:  # powers of two
                    for remat in REMAT_POLICIES:
                        yield MeshConfig(ways // fsdp, fsdp, tensor), accumulation, remat


def _tensor_sizes(architecture: models.ModelConfig, topology: Topology) -> list[int]:
    return [n for n in divisors(math.gcd(topology.num_devices, architecture.num_heads)) if n <= LARGEST_TENSOR]


def search(
    config: RunConfig, architecture: models.ModelConfig, topology: Topology, price: float | None
) -> tuple[train.Plan, list[train.Plan]]:
    """The recommended plan, compiled where the topology can be, and the estimates that it was chosen from.

    Raises `InputError` where nothing fits, with what comes nearest.
    """
    ranked = candidates(config, architecture, topology, price)
    if not ranked:
        rows, ways = config.train.batch_size, [topology.num_devices // n for n in _tensor_sizes(architecture, topology)]
        nearest = min((max(n, round(rows / n) * n) for n in ways), key=lambda batch: abs(batch - rows))
        raise InputError(f"--search: train.batch_size={rows} is divisible by no mesh of {topology}; nearest: {nearest}")
    promising = [plan for plan in ranked if _probably_fits(plan)]
    if not promising:
        raise InputError(
            f"--search: no mesh, micro-batch and remat policy fits {topology}; {describe(ranked[0])} comes nearest; "
            "take more chips"
        )
    if topology.chip.platform == "gpu":
        return promising[0], ranked
    for plan in promising[:CONFIRMED]:
        compiled = train.plan(*of_plan(config, architecture, plan), topology, price)
        if compiled["memory"]["fits"] is not False:
            return compiled, ranked
    raise InputError(f"--search: the best {CONFIRMED} estimates do not fit {topology} once compiled; take more chips")


def advice(config: RunConfig, architecture: models.ModelConfig, topology: Topology, price: float | None) -> str:
    """What to change in a run that does not fit: the fastest variant that should, by estimate."""
    ranked = candidates(config, architecture, topology, price)
    if ranked and _probably_fits(ranked[0]):
        return describe(ranked[0])
    return f"nothing on {topology}, by estimate, with this batch: more chips, or a smaller model"


def of_plan(config: RunConfig, architecture: models.ModelConfig, plan: train.Plan):
    """The run that a plan is of."""
    return train.variant(
        config,
        architecture,
        mesh=MeshConfig(**plan["mesh"]),
        accumulation=plan["accumulation"],
        remat=plan["remat"],
    )


def describe(plan: train.Plan) -> str:
    """A variant as overrides of its config: `--config.mesh.data=4 …`, and its memory."""
    total = plan["memory"]["total"] / 2**30
    return (
        f"{mesh_overrides(plan)} --config.train.accumulation={plan['accumulation']} "
        f"--config.model.remat={plan['remat']} ({plan['source']} {total:.1f} GiB a device)"
    )


def mesh_overrides(plan: train.Plan) -> str:
    """A plan's mesh as overrides of its config: `--config.mesh.data=4 …`."""
    return " ".join(f"--config.mesh.{part}" for part in describe_mesh(plan["mesh"].values()).split(" x "))
