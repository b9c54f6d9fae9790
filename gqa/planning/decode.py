"""The plan of decoding: for each number of key/value heads the memory of the loop, the largest batch, time a sample."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from gqa import models, sharding
from gqa.errors import InputError, one_of
from gqa.models.heads import divisors
from gqa.nn.cache import check_cache_dtype
from gqa.planning import hlo, roofline
from gqa.planning.chips import Topology
from gqa.planning.programs import (
    Compiled,
    bytes_per_device,
    cache_bytes,
    compile_program,
    decode_program,
    devices,
    dot_flops,
    unused_bytes,
)
from gqa.planning.train import Plan, head_notes, with_total
from gqa.sharding import MeshConfig
from gqa.training.config import DTYPES


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """What is decoded: the sections of a config such as `configs/plan/decode_t5_xxl.py`."""

    size: str  # ready-made architecture
    changes: Mapping[str, Any]  # fields of it to change
    kv_heads: tuple[int, ...]  # numbers of key/value heads to plan for, at the sites that a conversion changes
    dtype: str  # of parameters and activations
    cache_dtype: str | None  # int8 quantises the cache; None: dtype
    batch_size_per_device: int  # rows wanted, over all devices per device
    inputs_length: int
    new_tokens: int
    mesh: MeshConfig

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "DecodeConfig":
        """From a config file's dictionary; raises `InputError` for unknown and missing keys and impossible sizes."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(raw) != names:
            wrong = sorted(set(raw) ^ names)[0]
            raise InputError(f"config.{wrong} is {'unknown' if wrong in raw else 'missing'} in a decoding config")
        if not {"data", "fsdp", "tensor"} <= set(raw["mesh"]) <= set(sharding.MESH_AXES):
            raise InputError(f"config.mesh has {', '.join(raw['mesh'])}; expected data, fsdp and tensor")
        config = cls(**{**raw, "kv_heads": tuple(raw["kv_heads"]), "mesh": MeshConfig(**raw["mesh"])})
        for name in ("batch_size_per_device", "inputs_length", "new_tokens"):
            if getattr(config, name) < 1:
                raise InputError(f"config.{name}={getattr(config, name)}; expected at least 1")
        one_of("config.dtype", config.dtype, DTYPES)
        check_cache_dtype(config.cache_dtype)
        if not config.kv_heads:
            raise InputError("config.kv_heads is empty; expected numbers such as (64, 8, 1)")
        return config

    def architecture(self, kv_heads: int) -> models.ModelConfig:
        """The model with `kv_heads` at its converted sites; raises `InputError` where they do not divide the heads."""
        base = models.replace(models.size(self.size), **self.changes)
        sites = models.FAMILIES[models.family_of(base)].converted_sites
        heads = {f"{site}_kv_heads": kv_heads for site in sites}
        return models.replace(base, **heads, dtype=self.dtype, param_dtype=self.dtype, remat="none")


def plan(config: DecodeConfig, topology: Topology, price: float | None, estimate: bool = False) -> Plan:
    """For each K the loop at the batch wanted or, where that does not fit, at the largest batch that does.

    `estimate`: without a compiler, from the exact sizes of parameters and cache.
    """
    sizes = config.mesh.sizes(topology.num_devices)
    mesh = AbstractMesh(sizes, sharding.MESH_AXES)
    if not estimate:
        mesh = sharding.make_mesh(config.mesh, devices(topology))
    step = _ways(mesh)
    wanted = config.batch_size_per_device * topology.num_devices
    if wanted % step:
        raise InputError(
            f"batch_size_per_device={config.batch_size_per_device} on {topology.num_devices} devices is not divisible "
            f"by slice*data*fsdp={step}; nearest: {max(step, round(wanted / step) * step) // topology.num_devices or 1}"
        )
    architectures = {K: config.architecture(K) for K in config.kv_heads}  # refuses before anything is compiled
    notes = {K: head_notes(architecture, mesh.shape["tensor"]) for K, architecture in architectures.items()}
    return {
        "kind": "decoding",
        "source": "estimated" if estimate else "compiled",
        "topology": str(topology),
        "devices": topology.num_devices,
        "mesh": dict(mesh.shape),
        "size": config.size,
        "inputs_length": config.inputs_length,
        "new_tokens": config.new_tokens,
        "batch_wanted": wanted,
        "rows": [
            _row(config, architectures[K], topology, price, mesh, wanted, estimate) | {"kv_heads": K, "notes": notes[K]}
            for K in config.kv_heads
        ],
    }


def _ways(mesh: Mesh | AbstractMesh) -> int:
    """Devices, or groups of them, that the rows of a batch are cut over."""
    return math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])


def _row(config, architecture, topology, price, mesh: Mesh | AbstractMesh, wanted: int, estimate: bool) -> Plan:
    step = _ways(mesh)
    model, state = _sizes(config, architecture, mesh, step)
    one, fixed = bytes_per_device(state), bytes_per_device(model)
    limit = topology.chip.hbm

    def largest(temporaries: int) -> int:  # rows, from the bytes of each
        return step * max(0, (limit - fixed - temporaries) // one) if limit else wanted

    attempts, rows, compiled, seconds = [], wanted, None, 0.0
    if estimate:
        rows = min(wanted, largest(0))
    while not estimate:
        compiled, program = _compile(config, architecture, mesh, rows)
        seconds += compiled.seconds
        total = compiled.total + unused_bytes(program)
        fits = False if compiled.fits is False else None if limit is None else total <= limit
        attempts.append({"batch": rows, "bytes": total, "fits": fits})
        if attempts[-1]["fits"] is not False or rows <= step:
            break
        # The temporaries grow with the batch too: what one row more takes, as of this attempt.
        per_row = (total - fixed) / rows
        rows = min(rows - step, int((limit - fixed) / per_row) // step * step)
        if rows < step:
            break
    most = rows
    if limit and not estimate and attempts[-1]["fits"]:
        per_row = max(1, (total - fixed - compiled.code) / rows)
        most = max(rows, int((limit - fixed - compiled.code) / per_row) // step * step)
    elif estimate:
        most = largest(0)
    row = {
        "fits_wanted": attempts[0]["fits"] if attempts else rows == wanted,
        "batch": rows,
        "largest_batch": most if len(attempts) < 2 else rows,
        "attempts": attempts,
        "compile_seconds": seconds,
    }
    if rows < step or (attempts and attempts[-1]["fits"] is False):
        return row | {"batch": 0, "largest_batch": 0, "memory": with_total({"parameters": fixed}, topology, False)}
    _, state = _sizes(config, architecture, mesh, rows)
    cache = cache_bytes(state)
    parts = {
        "parameters": fixed,
        "cache": cache,
        "batch": bytes_per_device(state) - cache,
        "temporaries": compiled.temporaries if compiled else 0,
        "padding": 0,
        "program": compiled.code + compiled.results if compiled else 0,
    }
    if compiled:
        parts["padding"] = max(0, total - sum(parts.values()))
    row["memory"] = with_total(parts, topology, compiled.fits if compiled else None)
    if compiled is not None:
        flops = dot_flops(program.traced.jaxpr.jaxpr) / topology.num_devices
        one_step = hlo.turn(compiled.program)
        traffic, collectives = hlo.memory_traffic(one_step), hlo.collectives(one_step)
        once = hlo.memory_traffic(compiled.program) - traffic
    else:
        flops, traffic, collectives = *_step_of_shapes(config, architecture, model, rows), []
        flops, traffic, once = flops / topology.num_devices, traffic + cache, 0
    return row | _times(config, architecture, topology, price, rows, flops, traffic, once, collectives)


def _step_of_shapes(config: DecodeConfig, architecture, model: models.Model, rows: int) -> tuple[int, int]:
    """A step's FLOPs on all devices, and the bytes of parameters that it reads on each: of decoder and logits.

    Keys and values of cross-attention are in the cache, so that their kernels are not read.
    """
    logits = model.embedding if architecture.tied_logits else model.logits
    unread = []
    if "cross" in models.FAMILIES[models.family_of(architecture)].sites:
        unread = [(attention.key, attention.value) for attention in models.site_attention(model, "cross")]
    kernels = models.num_parameters((model.decoder, logits)) - models.num_parameters(unread)
    of_layer = architecture.num_heads * architecture.head_dim * (config.inputs_length + config.new_tokens)
    flops = 2 * rows * (kernels + 2 * len(model.decoder) * of_layer)  # scores, and the sum of values
    return flops, bytes_per_device((model.decoder, logits)) - bytes_per_device(unread)


def _sizes(config: DecodeConfig, architecture, mesh, rows: int):
    program = decode_program(
        architecture,
        mesh,
        rows=rows,
        lengths=(config.inputs_length, config.new_tokens),
        cache_dtype=config.cache_dtype,
        trace=False,
    )
    return program.model, program.state


def _compile(config: DecodeConfig, architecture, mesh: Mesh, rows: int) -> tuple[Compiled, Any]:
    program = decode_program(
        architecture,
        mesh,
        rows=rows,
        lengths=(config.inputs_length, config.new_tokens),
        cache_dtype=config.cache_dtype,
    )
    with jax.set_mesh(mesh):
        return compile_program(program.traced.lower(), bytes_per_device((program.model, program.state))), program


def _times(
    config, architecture, topology: Topology, price, rows, flops: float, traffic: float, once: float, collectives: list
) -> Plan:
    """Of a step, and of a batch: reading the inputs, `once` bytes around the loop (the cache laid out anew), steps."""
    step = roofline.times(topology, flops=flops, traffic=traffic, collectives=collectives)
    around = roofline.times(topology, flops=0, traffic=once, collectives=[])["step"]
    reading = _reading_flops(config, architecture, rows) / topology.num_devices
    read = roofline.times(topology, flops=reading, traffic=0, collectives=[])["step"]
    seconds = None if step["step"] is None else read + around + config.new_tokens * step["step"]
    # As GQA §3.1 counts: seconds of one chip for one sample.
    sample = None if seconds is None else seconds * topology.num_devices / rows
    return {
        "work": {
            "flops_per_device_and_step": flops,
            "bytes_per_device_and_step": traffic,
            "bytes_per_device_around_the_steps": once,
        },
        "collectives": [each._asdict() for each in collectives],
        "seconds": step | {"reading": read, "around_the_steps": around, "batch": seconds, "sample_chip": sample},
        "usd_per_1000_samples": None if None in (sample, price) else 1000 * sample / 3600 * price,
    }


def _reading_flops(config: DecodeConfig, architecture: models.ModelConfig, rows: int) -> int:
    """FLOPs of the matrix products that read the inputs, traced; on all devices."""
    from gqa.decode import generate

    of_rows = jax.ShapeDtypeStruct((rows,), jnp.int32)
    inputs = jax.ShapeDtypeStruct((rows, config.inputs_length), jnp.int32)
    traced = generate.prefill_program.trace(
        models.abstract(architecture), inputs, of_rows, of_rows, config.new_tokens, 0, config.cache_dtype
    )
    return dot_flops(traced.jaxpr.jaxpr)


def search(config: DecodeConfig, topology: Topology, price: float | None, estimate: bool) -> tuple[Plan, list[Plan]]:
    """The mesh that holds most K and takes least time a sample by estimate, planned; and all estimates, best first.

    Raises `InputError` where no mesh holds a row with any K.
    """
    heads, n = config.architecture(config.kv_heads[0]).num_heads, topology.num_devices
    meshes = [MeshConfig(n // tensor, 1, tensor) for tensor in divisors(math.gcd(n, heads))]
    changed = [dataclasses.replace(config, mesh=mesh) for mesh in meshes]
    plans = sorted((plan(each, topology, price, estimate=True) for each in changed), key=_rank)
    if not any(row["batch"] for row in plans[0]["rows"]):
        raise InputError(f"--search: no mesh of {topology} holds {config.size}; take more chips")
    best = dataclasses.replace(config, mesh=MeshConfig(**plans[0]["mesh"]))
    return plan(best, topology, price, estimate), plans


def _rank(plan: Plan) -> tuple[int, float]:
    """First by the numbers of heads that do not fit at all, then by the time of a sample with the others."""
    fitting = [row for row in plan["rows"] if row["batch"]]
    return len(plan["rows"]) - len(fitting), sum(row["seconds"]["sample_chip"] or 0 for row in fitting)
