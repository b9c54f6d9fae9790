"""Where arrays live: each parameter names its logical axes, one table maps them to mesh axes.

The mesh has five axes, from the slowest network to the fastest: `slice` (pods, over the data centre's network; each has
all parameters and its part of the batch), `data` (replicas), `fsdp` (parameters cut along the model width), `sequence`
(activations cut along their length) and `tensor` (heads, MLP and vocabulary). A dimension that its mesh axis does not
divide is replicated, and the log says so once.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.errors import InputError

MESH_AXES = ("slice", "data", "fsdp", "sequence", "tensor")

# Logical axis -> mesh axes. Every parameter and activation goes through this table and no other.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "rank": (),
    "buckets": (),
    "length": ("sequence",),  # of residual stream, queries and MLP; keys and values are gathered: `kv_length`
    "kv_length": (),
    "activation": (),  # the model width of an activation: `embed` would clash with the batch on `fsdp`
}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; one size may be -1: whatever is left."""

    data: int  # replicas of the model
    fsdp: int  # ways the parameters are cut along the model width
    tensor: int  # ways heads, MLP and vocabulary are cut
    slice: int = 1  # pods (TPU slices) or groups of hosts that a slower network joins
    sequence: int = 1  # ways activations are cut along their length, for long inputs

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The sizes of `MESH_AXES` for `num_devices`; raises `InputError` when they do not multiply to it."""
        sizes = [getattr(self, name) for name in MESH_AXES]
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(
                f"mesh {describe_mesh(sizes)}: sizes are positive, at most one is -1 (the rest of the devices)"
            )
        if -1 in sizes:
            known = math.prod(size for size in sizes if size != -1)
            if num_devices % known:
                raise InputError(
                    f"mesh {describe_mesh(sizes)} does not fit {num_devices} device(s): {known} does not divide it; "
                    f"nearest: {_nearest_divisor(known, num_devices)}"
                )
            sizes[sizes.index(-1)] = num_devices // known
        if math.prod(sizes) != num_devices:
            raise InputError(
                f"mesh {describe_mesh(sizes)} needs {math.prod(sizes)} device(s), found {num_devices}; "
                f"nearest: {describe_mesh(_nearest_mesh(sizes, num_devices))}"
            )
        return tuple(sizes)


def describe_mesh(sizes: Iterable[int]) -> str:
    """Sizes of `MESH_AXES` to read: `data=2 x fsdp=4 x tensor=1`, and of the others those that cut."""
    named = zip(MESH_AXES, sizes, strict=True)
    shown = ((name, size) for name, size in named if size != 1 or name in ("data", "fsdp", "tensor"))
    return " x ".join(f"{name}={size}" for name, size in shown)


def _nearest_mesh(sizes: Sequence[int], num_devices: int) -> Sequence[int]:
    """Sizes that multiply to `num_devices`: with other replicas alone if that can be, else of the least ratios."""
    data = MESH_AXES.index("data")
    model = math.prod(sizes) // sizes[data]
    if num_devices % model == 0:
        return [*sizes[:data], num_devices // model, *sizes[data + 1 :]]

    def meshes(count: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (count,)
            return
        for size in (n for n in range(1, count + 1) if count % n == 0):
            yield from ((size, *rest) for rest in meshes(count // size, axes - 1))

    def distance(mesh: tuple[int, ...]) -> float:
        return sum(abs(math.log(found / wanted)) for found, wanted in zip(mesh, sizes, strict=True))

    return min(meshes(num_devices, len(sizes)), key=distance)


def _nearest_divisor(value: int, total: int) -> int:
    return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: (abs(n - value), n))


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A `Mesh` of all devices (or of `devices`), axes `MESH_AXES`, as their networks lie.

    Raises `InputError` for sizes that do not multiply to the devices, for TPU slices that are not `config.slice`, and
    for sizes that a TPU's torus cannot be cut into.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and slices != sizes[0]:
        raise InputError(f"mesh.slice={sizes[0]}, but the devices are in {slices} slice(s); set mesh.slice={slices}")
    try:
        if sizes[0] == slices > 1:
            networks = (1, *sizes[1:]), (slices, *(1,) * len(sizes[1:]))
            array = mesh_utils.create_hybrid_device_mesh(*networks, devices, allow_split_physical_axes=True)
        else:
            array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"mesh {describe_mesh(sizes)} cannot be laid on the devices: {error}") from error
    # `Mesh` has Auto axes; `jax.make_mesh` would give Explicit ones.
    return Mesh(array, MESH_AXES)


@functools.cache
def _say_replicated(axis: str, size: int, mesh_axes: tuple[str, ...], degree: int) -> None:
    _log.warning("%s=%d is not divisible by mesh axes %s=%d: replicated", axis, size, "*".join(mesh_axes), degree)


def partition_spec(
    mesh: Mesh | jax.sharding.AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """The `PartitionSpec` of an array with logical `axes`; a shape one longer has a leading `layers` axis."""
    # A vmapped init leaves the metadata one shorter than the array.
    axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    spec, used = [], set()
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in (RULES[axis] if axis else ()) if a not in used and mesh.shape.get(a, 1) > 1)
        degree = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % degree:
            _say_replicated(axis, size, mesh_axes, degree)
            mesh_axes = ()
        used.update(mesh_axes)
        spec.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*spec)


def logical_axes(tree) -> dict[str, tuple[str, ...]]:
    """Logical axes of every parameter of a module as declared, by `jax.tree_util.keystr` of its array's path.

    A stacked parameter has one dimension more than it has axes: the leading `layers`.
    """
    variables = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return {
        jax.tree_util.keystr(path): variable.get_metadata()["axes"]
        for path, variable in zip(paths, variables, strict=True)
    }


def shardings(mesh: Mesh, tree, axes: dict[str, tuple[str, ...]]):
    """`tree` with each array (or shape) replaced by the `NamedSharding` of its logical axes, looked up by its path."""

    def of_leaf(path, leaf):
        return NamedSharding(mesh, partition_spec(mesh, axes[jax.tree_util.keystr(path)], leaf.shape))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def parameter_shardings(mesh: Mesh, model):
    """A module (or its abstract shapes) with each array replaced by its `NamedSharding`."""
    return shardings(mesh, model, logical_axes(model))


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Rows of a batch over `slice`, `data` and `fsdp`."""
    return NamedSharding(mesh, partition_spec(mesh, ("batch",) + (None,) * (len(shape) - 1), shape))


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, ascending: what it has to read of it."""
    indices = batch_sharding(mesh, (batch_size,)).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def place_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """A batch on the devices, of all its rows or, in several processes, of each process's `rows_here`."""
    if jax.process_count() == 1:
        return jax.device_put(rows, batch_sharding(mesh, rows.shape))
    # How many rows all processes have follows from the sharding; the devices divide them (`RunConfig.check_devices`).
    axes = tuple(axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(axes or None)), rows)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the table when a mesh is set (`jax.set_mesh`); otherwise `x` unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))
