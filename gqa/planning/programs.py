"""The programs that a plan is about: the very step that `gqa.train` runs and the very loop that decoding runs, compiled
for devices that need not be there."""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gqa import models, sharding
from gqa.adapters.lora import LoRAConfig
from gqa.decode import generate
from gqa.errors import InputError
from gqa.models.quantize import quantize_layers
from gqa.planning import hlo
from gqa.planning.chips import Topology
from gqa.training import optimizer as optimizers
from gqa.training.config import RunConfig
from gqa.training.loop import language_model_loss
from gqa.training.recipe import all_parameters, with_adapter
from gqa.training.state import Batch, TrainState, abstract_state, jit_train_step, make_train_step

INSTALL_LIBTPU = "pip install 'jax[tpu]' (about 200 MB; no TPU is needed)"


def devices(topology: Topology) -> list:
    """Devices to compile for. Raises `InputError` where libtpu, or the number of forced host devices, is missing."""
    chip = topology.chip
    if chip.platform != "tpu":
        found = jax.devices(chip.platform)
        if len(found) < topology.num_devices:
            raise InputError(f"--topology={topology}: found {len(found)} device(s); nearest: {len(found)}")
        return found[: topology.num_devices]
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--topology={topology} needs TPU's compiler, libtpu; install it with {INSTALL_LIBTPU}")
    # Without these libtpu asks Google Cloud's metadata server which TPU this machine has, and logs that there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else two plans at once: one fails on a lock
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "4")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "4")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if chip.torus == 3:
        options["chip_config_name"] = "megacore"  # else a chip is two devices with half of its memory each
    if topology.num_devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{chip.compiler_name}:{'x'.join(map(str, topology.shape))}"
    return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, per device."""

    arguments: int  # bytes of the arguments, the donated ones included
    results: int  # bytes of the results that do not take the place of an argument
    temporaries: int  # bytes; where the program does not fit, what it would need
    code: int
    fits: bool | None  # None: the compiler does not know the memory's size
    program: hlo.Program | None  # None where it does not fit: there is no program then
    seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporaries + self.code


def compile_program(lowered: jax.stages.Lowered, arguments: int) -> Compiled:
    """Compiles; `arguments` are the bytes of its arguments per device, for a program that does not fit."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error))
        if needed is None:
            raise
        return Compiled(arguments, 0, max(needed - arguments, 0), 0, False, None, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        fits=True,
        program=hlo.parse(compiled.as_text()),
        seconds=seconds,
    )


# libtpu's words, by the pass that finds out.
_NEEDS = (
    r"Used ([0-9.]+)([KMGT]?) of [0-9.]+[KMGT]? hbm",
    r"total memory required for HLO temporaries \(([0-9.]+)([KMGT]?)\) exceeds available HBM",
)


def memory_needed(message: str) -> int | None:
    """Bytes that libtpu says a program would use, where it refuses one for that."""
    for pattern in _NEEDS:
        if match := re.search(pattern, message):
            return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
    return None


def bytes_per_device(tree) -> int:
    """Bytes of a tree of shapes on the device that holds most of it."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def batch_shapes(config: RunConfig, architecture: models.ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a training batch, as `gqa.data.packing.packed_row` makes them; no records are needed."""
    data = config.data
    task = data.make_task(architecture.vocab_size)
    has_inputs, family = task.inputs_length > 0, models.family_of(architecture)
    if has_inputs != (family == "t5"):
        tasks = "span_corruption, prefix_lm" if family == "t5" else "causal_lm"
        raise InputError(f"data.task={data.task!r} is not for a {family} model; expected one of {tasks}")
    rows = config.train.batch_size
    lengths = {"targets": jnp.int32, "targets_segments": jnp.int32, "decoder_inputs": jnp.int32}
    shapes = {
        name: jax.ShapeDtypeStruct((rows, task.targets_length), dtype)
        for name, dtype in (lengths | {"loss_weights": jnp.float32}).items()
    }
    if has_inputs:
        shapes |= {
            name: jax.ShapeDtypeStruct((rows, task.inputs_length), jnp.int32) for name in ("inputs", "inputs_segments")
        }
    return shapes


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """A training step, not compiled yet."""

    state: TrainState  # shapes and shardings
    frozen: tuple  # what the step reads beside it: the base of adapters
    batch: Batch
    traced: jax.stages.Traced


def train_program(config: RunConfig, architecture: models.ModelConfig, mesh: Mesh) -> TrainProgram:
    """The step of `gqa.training.loop.train`, traced for `mesh`."""
    model = models.abstract(architecture)
    recipe = all_parameters(model, None)
    if config.adapter is not None:
        recipe = with_adapter(recipe, config, model, *frozen_part(config.adapter, model, mesh))
    optimizer = optimizers.optimizer(config.optimizer, config.schedule_offset, sharding.logical_axes(recipe.trained))
    learning_rate = optimizers.schedule(config.optimizer)
    loss_fn = language_model_loss(config.train.z_loss, config.model.dropout_rate > 0)
    step = make_train_step(
        lambda trained, batch, key, step, *frozen: loss_fn(recipe.whole(trained, key, *frozen), batch, key, step),
        optimizer,
        lambda step: learning_rate(step + config.schedule_offset),
        accumulation=config.train.accumulation,
        seed=config.train.seed,
    )
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.batch_sharding(mesh, leaf.shape))
        for name, leaf in batch_shapes(config, architecture).items()
    }
    with jax.set_mesh(mesh):
        state = abstract_state(recipe.trained, optimizer, mesh)
        traced = jit_train_step(step, state).trace(state, batch, *recipe.frozen)
        return TrainProgram(state, recipe.frozen, batch, traced)


def frozen_part(adapter: LoRAConfig | None, model: models.Model, mesh: Mesh | AbstractMesh) -> tuple:
    """Shapes and shardings of what adapters stand beside, in the bits that `adapter.base` says; else nothing."""
    if adapter is None:
        return ()
    if adapter.base is not None:
        model = jax.eval_shape(lambda model: quantize_layers(model, adapter.base), model)
    return (_placed(model, sharding.parameter_shardings(mesh, model)),)


@dataclasses.dataclass(frozen=True)
class DecodeProgram:
    """The loop of decoding, not compiled yet; its body makes one token for each row."""

    model: models.Model  # shapes and shardings
    state: generate.State
    traced: jax.stages.Traced | None


def decode_program(
    architecture: models.ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    rows: int,
    lengths: tuple[int, int],
    cache_dtype: str | None,
    trace: bool = True,
) -> DecodeProgram:
    """`gqa.decode.generate.decode` for `rows` rows of `lengths` (inputs, new tokens), traced for `mesh`.

    The model is in its `unstacked` form; rows and key/value heads of the cache are cut as those of activations.
    Without `trace` only the shapes are there.
    """
    model = jax.eval_shape(lambda model: model.unstacked(), models.abstract(architecture))
    model = _placed(model, sharding.parameter_shardings(mesh, model))
    inputs_length, new_tokens = lengths
    of_rows = jax.ShapeDtypeStruct((rows,), jnp.int32)
    inputs = jax.ShapeDtypeStruct((rows, inputs_length), jnp.int32)
    state = jax.eval_shape(
        lambda *arrays: generate.prefill_program(*arrays, new_tokens, 0, cache_dtype),
        *(model, inputs, of_rows, of_rows),
    )
    state = _placed(state, _state_shardings(mesh, state))
    if not trace:
        return DecodeProgram(model, state, None)
    with jax.set_mesh(mesh):
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        end = jax.ShapeDtypeStruct((4,), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = generate.decode_program.trace(model, state, scalar, scalar, end, None, key)
    return DecodeProgram(model, state, traced)


def _placed(tree, placement):
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, placement
    )


def _state_shardings(mesh: Mesh | AbstractMesh, state: generate.State):
    def of_leaf(leaf):
        axes = ("batch",) + (None,) * (leaf.ndim - 1) if leaf.ndim else ()
        if leaf.ndim == 5:  # a cache, its layers in front
            axes = ("batch", "kv_heads", "length", "head_dim")
        return NamedSharding(mesh, sharding.partition_spec(mesh, axes, leaf.shape))

    return jax.tree.map(of_leaf, state)


def unused_bytes(program: DecodeProgram) -> int:
    """Bytes per device of parameters that the loop does not read, as the encoder's: they stay in memory beside it."""
    jaxpr = program.traced.jaxpr.jaxpr
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    leaves = jax.tree.leaves(program.model)
    return bytes_per_device(
        [leaf for leaf, variable in zip(leaves, jaxpr.invars, strict=False) if id(variable) not in used]
    )


def cache_bytes(state: generate.State) -> int:
    """Bytes per device of a decoding state's caches."""
    return bytes_per_device([leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 5])


# cuDNN's attention is one primitive without an inner program. Backward it computes the scores again.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def dot_flops(jaxpr, while_trips: int = 1) -> int:
    """FLOPs of all matrix products of a traced program on all devices together, scans counted by their length.

    Pallas kernels count all points of their grids, also those they may skip; attention of cuDNN counts its products.
    What the backward pass computes again is in it. A `while` runs its body `while_trips` times.
    """
    total = 0
    for equation in jaxpr.eqns:
        parameters: Mapping[str, Any] = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left, result = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)
            continue
        if equation.primitive.name in _CUDNN_PRODUCTS:
            query_BTHd, key_BSKd = (variable.aval for variable in equation.invars[:2])
            products = _CUDNN_PRODUCTS[equation.primitive.name]
            total += 2 * products * math.prod(query_BTHd.shape) * key_BSKd.shape[1]
            continue
        runs = _runs(equation, while_trips)
        if equation.primitive.name == "cond":
            total += max(dot_flops(branch.jaxpr, while_trips) for branch in parameters["branches"])
            continue
        for value in parameters.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += runs * dot_flops(inner, while_trips)
    return total


def _runs(equation, while_trips: int) -> int:
    """How often an equation's inner program runs, on all devices together."""
    parameters = equation.params
    match equation.primitive.name:
        case "scan":
            return parameters["length"]
        case "while":
            return while_trips
        case "pallas_call":
            return math.prod(parameters["grid_mapping"].grid)
        case "shard_map":  # its body is of one device
            return parameters["mesh"].size
    return 1
