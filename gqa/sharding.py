"""Where arrays live: each parameter names its logical axes, one table maps them to mesh axes.

The mesh has three axes: `data` (replicas), `fsdp` (parameters cut along the model width) and `tensor` (heads, MLP and
vocabulary). A dimension that its mesh axis does not divide is replicated, and the log says so once.
"""

import dataclasses
import functools
import logging
import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Every parameter and activation goes through this table and no other.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "rank": (),
    "buckets": (),
    "length": (),
    "activation": (),  # the model width of an activation: `embed` would clash with the batch on `fsdp`
}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; one size may be -1: whatever is left."""

    data: int  # replicas of the model
    fsdp: int  # ways the parameters are cut along the model width
    tensor: int  # ways heads, MLP and vocabulary are cut

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """The three sizes for `num_devices`; raises `InputError` when they do not multiply to it."""
        sizes = [self.data, self.fsdp, self.tensor]
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(
                f"mesh {_describe(sizes)}: sizes are positive, at most one is -1 (the rest of the devices)"
            )
        if -1 in sizes:
            known = math.prod(size for size in sizes if size != -1)
            if num_devices % known:
                raise InputError(
                    f"mesh {_describe(sizes)} does not fit {num_devices} device(s): {known} does not divide it; "
                    f"nearest: {_nearest_divisor(known, num_devices)}"
                )
            sizes[sizes.index(-1)] = num_devices // known
        if math.prod(sizes) != num_devices:
            raise InputError(
                f"mesh {_describe(sizes)} needs {math.prod(sizes)} device(s), found {num_devices}; set one size to -1"
            )
        return tuple(sizes)


def _describe(sizes) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))


def _nearest_divisor(value: int, total: int) -> int:
    return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: (abs(n - value), n))


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A `Mesh` of all devices (or of `devices`), axes `data`, `fsdp`, `tensor`, innermost `tensor`."""
    devices = jax.devices() if devices is None else devices
    # `Mesh` has Auto axes; `jax.make_mesh` would give Explicit ones.
    return Mesh(np.asarray(devices).reshape(config.sizes(len(devices))), MESH_AXES)


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
        mesh_axes = tuple(a for a in (RULES[axis] if axis else ()) if a not in used and mesh.shape[a] > 1)
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
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, partition_spec(mesh, ("batch",) + (None,) * (len(shape) - 1), shape))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the table when a mesh is set (`jax.set_mesh`); otherwise `x` unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))
