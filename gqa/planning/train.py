"""The plan of a training run: memory by part, work, collectives, time and cost of its step on a topology."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gqa import models, sharding
from gqa.adapters import lora
from gqa.errors import InputError
from gqa.models.heads import divisors
from gqa.planning import hlo, roofline
from gqa.planning.chips import Topology
from gqa.planning.hlo import Collective
from gqa.planning.programs import (
    batch_shapes,
    bytes_per_device,
    compile_program,
    devices,
    dot_flops,
    frozen_part,
    train_program,
)
from gqa.training import optimizer as optimizers
from gqa.training.config import RunConfig, check_heads
from gqa.training.flops import train_step_flops
from gqa.training.state import abstract_state

Plan = dict[str, Any]


def check(config: RunConfig, architecture: models.ModelConfig, topology: Topology) -> list[str]:
    """Raises `InputError` where mesh, batch and heads do not fit the topology; returns what the user should know."""
    check_covered(config)
    config.check_devices(topology.num_devices)
    *_, tensor = config.mesh.sizes(topology.num_devices)
    return head_notes(architecture, tensor)


def check_covered(config: RunConfig) -> None:
    """Raises `InputError` for runs that have no plan."""
    if config.distillation is not None:
        raise InputError("config.distillation: a plan covers the student alone; expected None")
    for name in ("dpo", "reward"):
        if getattr(config, name) is not None:
            raise InputError(f"config.{name}: a plan covers training on text alone; expected None")
    if config.uptrain is not None and config.uptrain.merge is not None:
        raise InputError("config.uptrain.merge: a plan covers a converted checkpoint; expected None")


def head_notes(architecture: models.ModelConfig, tensor: int) -> list[str]:
    """Raises `InputError` where `tensor` does not divide the query heads; a line for each K that it replicates."""
    check_heads(architecture, tensor)
    notes = []
    for site in models.FAMILIES[models.family_of(architecture)].sites:
        for K in sorted(set(architecture.kv_heads(site))):
            if K % tensor:
                nearest = max(n for n in divisors(K) if n <= tensor)
                notes.append(
                    f"{site}: K={K} is not divisible by tensor={tensor}: every device holds all {K} key/value "
                    f"head(s), {tensor} times what a cut would leave; nearest tensor that "
                    f"divides: {nearest}"
                )
    return notes


def plan(config: RunConfig, architecture: models.ModelConfig, topology: Topology, price: float | None) -> Plan:
    """Compiles the step for the topology and says what it takes."""
    notes = check(config, architecture, topology)
    mesh = sharding.make_mesh(config.mesh, devices(topology))
    program = train_program(config, architecture, mesh)
    executed = dot_flops(program.traced.jaxpr.jaxpr) / topology.num_devices
    arguments = bytes_per_device((program.state, program.frozen, program.batch))
    with jax.set_mesh(mesh):
        lowered = program.traced.lower()
        compiled = compile_program(lowered, arguments)
    parts = memory_parts(program.state, program.frozen, program.batch, compiled.temporaries)
    parts |= {"padding": max(0, compiled.arguments - arguments), "program": compiled.code + compiled.results}
    collectives, traffic = [], None
    if compiled.program is not None:
        written = hlo.stacked_results(compiled.program, backward=False)
        parts = split_temporaries(parts, program.state, written)
        collectives = hlo.collectives(compiled.program)
        traffic = hlo.memory_traffic(compiled.program)
    memory = with_total(parts, topology, compiled.fits)
    return assemble(
        config, architecture, topology, price, mesh, memory, executed, traffic, collectives,
        {"source": "compiled", "compile_seconds": compiled.seconds, "notes": notes},
    )  # fmt: skip


def memory_parts(state, frozen, batch, temporaries: int) -> dict[str, int]:
    """Bytes per device by part, temporaries not split yet; `padding` is what tiled layouts of the state add."""
    base = {"frozen base": bytes_per_device(frozen)} if frozen else {}
    return base | {
        "parameters": bytes_per_device(state.model),
        "optimizer": bytes_per_device((state.optimizer, state.step)),
        "batch": bytes_per_device(batch),
        "gradients": 0,
        "activations": 0,
        "temporaries": temporaries,
        "padding": 0,
        "program": 0,
    }


def split_temporaries(parts: dict[str, int], state, activations: int) -> dict[str, int]:
    """Of the temporaries: gradients, as large as the parameters; what scans keep for the backward pass; the rest."""
    rest = parts["temporaries"]
    kept = min(activations, rest)
    gradients = min(bytes_per_device(state.model), rest - kept)
    return parts | {"gradients": gradients, "activations": kept, "temporaries": rest - kept - gradients}


def with_total(parts: dict[str, int], topology: Topology, fits: bool | None) -> Plan:
    """The parts with their sum, the chip's memory and whether it holds them."""
    total, limit = sum(parts.values()), topology.chip.hbm
    return {
        "parts": parts,
        "total": total,
        "limit": limit,
        "fits": False if fits is False else None if limit is None else total <= limit,
    }


def assemble(
    config, architecture, topology, price, mesh, memory, executed, traffic, collectives, origin
) -> Plan:  # fmt: skip
    """The plan as plain values."""
    shapes = {name: leaf.shape for name, leaf in batch_shapes(config, architecture).items()}
    model = _abstract_model(_without_remat(architecture))
    model_flops = train_step_flops(model, shapes, frozen=config.adapter is not None)
    unknown = traffic is None
    times = roofline.times(topology, flops=executed, traffic=traffic or 0, collectives=collectives)
    if unknown:
        times = dict.fromkeys(times)
    seconds = times["step"] and times["step"] * config.steps
    return {
        "kind": "training",
        **origin,
        "topology": str(topology),
        "devices": topology.num_devices,
        "mesh": dict(mesh.shape),
        "remat": architecture.remat,
        "batch": config.train.batch_size,
        "accumulation": config.train.accumulation,
        "lengths": {name: shape[1] for name, shape in shapes.items() if name in ("inputs", "targets")},
        "parameters": models.num_parameters(model),
        "memory": memory,
        "work": {
            "model_flops_per_step": model_flops,
            "model_flops_per_device": model_flops / topology.num_devices,
            "executed_flops_per_device": executed,
            "bytes_per_device": traffic,
        },
        "collectives": [each._asdict() for each in collectives],
        "seconds": times,
        "mfu": roofline.utilisation(model_flops, topology, times["step"]),
        "mfu_without_overlap": roofline.utilisation(model_flops, topology, times["without_overlap"]),
        "run": {"steps": config.steps, "price": price} | roofline.cost(topology, seconds, price),
    }


def estimate(config: RunConfig, architecture: models.ModelConfig, topology: Topology, price: float | None) -> Plan:
    """The same without a compiler: state exact from its shardings, activations and traffic by rules of thumb.

    Rules, of `t` tokens a device and micro-batch and of its scores `s` (float32): `full` keeps one [t, D] a layer,
    `dots` the outputs of its matrix products, `none` also scores and weights; a layer at work needs 4 s and three MLP
    activations; memory sees 20 s and 40 [t, D] a layer. Against compiled steps of T5-XXL and Llama-2-70B the memory
    is within a fifth, the traffic within a factor of two.
    """
    notes = check(config, architecture, topology)
    mesh = AbstractMesh(config.mesh.sizes(topology.num_devices), sharding.MESH_AXES)
    state, frozen = _abstract_state(
        _without_remat(architecture), config.optimizer, config.schedule_offset, config.adapter, mesh
    )
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.batch_sharding(mesh, leaf.shape))
        for name, leaf in batch_shapes(config, architecture).items()
    }
    return _estimated(config, architecture, topology, price, mesh, state, frozen, batch, notes)


def _without_remat(architecture: models.ModelConfig) -> models.ModelConfig:
    return models.replace(architecture, remat="none")


# A search asks for the same shapes again and again; remat does not change them.


@functools.lru_cache(maxsize=2)
def _abstract_model(architecture: models.ModelConfig) -> models.Model:
    return models.abstract(architecture)


@functools.lru_cache(maxsize=128)
def _abstract_state(architecture, optimizer_config, schedule_offset: int, adapter, mesh: AbstractMesh):
    model = _abstract_model(architecture)
    trained = model if adapter is None else lora.abstract(model, adapter)
    optimizer = optimizers.optimizer(optimizer_config, schedule_offset, sharding.logical_axes(trained))
    return abstract_state(trained, optimizer, mesh), frozen_part(adapter, model, mesh)


def _estimated(config, architecture, topology, price, mesh, state, frozen, batch, notes) -> Plan:
    data, fsdp, tensor = mesh.shape["slice"] * mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]
    sequence = mesh.shape["sequence"]
    itemsize = jnp.dtype(architecture.dtype).itemsize
    D, H, d, F = architecture.d_model, architecture.num_heads, architecture.head_dim, architecture.d_ff
    rows = config.train.batch_size // config.train.accumulation // (data * fsdp)
    kept = working = traffic = reduced = gathered_keys = 0
    passes = 6 if architecture.remat == "full" else 4
    for site in _sites(architecture, batch):
        cut = sequence if site.length % sequence == 0 else 1  # of queries; keys and values are gathered
        t = rows * site.length // cut
        scores = 4 * rows * H // tensor * site.scores // cut
        kv = -(-site.kv_heads // tensor) * d if site.kv_heads % tensor == 0 else site.kv_heads * d
        dots = t * (2 * D + site.attentions * (H * d // tensor + 2 * kv * cut + D) + 2 * F // tensor) * itemsize
        per_layer = {"full": t * D * itemsize, "dots": dots, "none": dots + scores * 2 + 4 * t * F // tensor * itemsize}
        kept += site.layers * per_layer[architecture.remat]
        working = max(working, 4 * scores + 3 * t * F // tensor * itemsize + 6 * t * D * itemsize)
        traffic += site.layers * (20 * scores + (40 * t * D + 20 * t * F // tensor) * itemsize)
        if cut > 1:  # gathered for the forward pass and again with remat; backward the gradients are scattered
            gathered_keys += site.layers * passes // 2 * rows * site.scores // site.length * 2 * kv * itemsize
        reduced += site.layers * (site.attentions + 1) / 2 * passes * t * D * itemsize
    targets = batch["targets"].shape[1]
    logits = 3 * 4 * rows * targets * architecture.vocab_size // tensor
    logits //= sequence if targets % sequence == 0 else 1
    model_bytes = bytes_per_device(state.model)
    model = _abstract_model(_without_remat(architecture))
    weights = models.num_parameters(model) * itemsize // tensor
    layers = sum(site.layers for site in _sites(architecture, batch))
    in_full = fsdp > 1 or (config.adapter is not None and config.adapter.base is not None)  # a layer, from its parts
    gathered = 2 * weights // layers if in_full else 0
    parts = memory_parts(state, frozen, batch, int(1.1 * (working + logits + gathered)))
    parts |= {"gradients": model_bytes * (2 if config.train.accumulation > 1 else 1), "activations": int(1.1 * kept)}
    N = config.train.accumulation
    collectives = []
    if fsdp > 1:  # weights for the forward and the backward pass; gradients
        collectives.append(Collective("all-gather", fsdp, N * 2 * layers, 2 * N * weights * (fsdp - 1) // fsdp))
        of_gradients = weights if config.adapter is None else model_bytes
        collectives.append(Collective("reduce-scatter", fsdp, N * layers, N * of_gradients * (fsdp - 1) // fsdp))
    if (copies := data * sequence) > 1:
        collectives.append(Collective("all-reduce", copies, N * layers, N * 2 * model_bytes * (copies - 1) // copies))
    if gathered_keys:
        sent = N * gathered_keys * (sequence - 1) // sequence
        collectives.append(Collective("all-gather", sequence, N * passes // 2 * layers, sent))
    if tensor > 1:
        sent = int(N * 2 * reduced * (tensor - 1) / tensor)
        collectives.append(Collective("all-reduce", tensor, N * 4 * layers, sent))
    shapes = {name: leaf.shape for name, leaf in batch.items()}
    again = {"none": 0, "dots": 0.15, "full": 1}[architecture.remat] * train_step_flops(model, shapes) / 3
    executed = (train_step_flops(model, shapes, frozen=config.adapter is not None) + again) / topology.num_devices
    return assemble(
        config, architecture, topology, price, mesh, with_total(parts, topology, None), executed,
        N * (traffic + 3 * weights) + 10 * model_bytes, collectives,
        {"source": "estimated", "compile_seconds": None, "notes": notes},
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Site:
    """Layers of one side of a model: `scores` is queries times keys, over the layer's attentions."""

    layers: int
    length: int
    attentions: int
    scores: int
    kv_heads: int


def _sites(architecture: models.ModelConfig, batch) -> list[_Site]:
    targets = batch["targets"].shape[1]
    kv_heads = max(architecture.kv_heads("decoder_self"))
    if models.family_of(architecture) != "t5":
        return [_Site(architecture.num_layers, targets, 1, targets**2, kv_heads)]
    inputs = batch["inputs"].shape[1]
    decoder = _Site(architecture.num_decoder_layers, targets, 2, targets**2 + targets * inputs, kv_heads)
    heads = max(architecture.kv_heads("encoder_self"))
    return [_Site(architecture.num_encoder_layers, inputs, 1, inputs**2, heads), decoder]


def variant(
    config: RunConfig, architecture: models.ModelConfig, *, mesh: sharding.MeshConfig, accumulation: int, remat: str
) -> tuple[RunConfig, models.ModelConfig]:
    """The same run with another mesh, number of micro-batches and remat policy."""
    changed = dataclasses.replace(
        config,
        mesh=mesh,
        train=dataclasses.replace(config.train, accumulation=accumulation),
        model=dataclasses.replace(config.model, remat=remat),
    )
    return changed, models.replace(architecture, remat=remat)
