"""Stacks of equal layers: parameters stacked on a leading axis, applied by a scan or unrolled.

Layers that differ in their number of key/value heads cannot share a stack: a model holds one stack per run of equal
layers. `unstack` turns every stack into stacks of one layer, the form that decodes fastest.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gqa.errors import InputError

# Remat policy -> `jax.checkpoint` policy; None recomputes nothing.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def runs(kinds: Sequence[Hashable]) -> list[tuple[Hashable, int]]:
    """Run lengths of equal kinds: `[8, 8, 2]` gives `[(8, 2), (2, 1)]`."""
    return [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]


def init_stacks(make_layer: Callable, kinds: Sequence[Hashable], key: jax.Array) -> nnx.List:
    """One stack per run of equal `kinds`; `make_layer(kind, key)` makes a layer, its key a function of its number."""
    keys = jax.random.split(key, len(kinds))
    stacks, first = [], 0
    for kind, length in runs(kinds):
        layer_keys = keys[first : first + length]
        stacks.append(jax.vmap(lambda layer_key, kind=kind: make_layer(kind, layer_key))(layer_keys))
        first += length
    return nnx.List(stacks)


def num_layers(stack) -> int:
    """Layers in a stack."""
    return jax.tree.leaves(stack)[0].shape[0]


def split_layers(stack) -> list:
    """The layers of a stacked pytree, one by one, without the leading axis."""
    length = num_layers(stack)
    leaves, structure = jax.tree.flatten(stack)
    # `split`'s gradient is one concatenation; indexing's would be a sum of `length` padded arrays.
    layers = zip(
        *([jnp.squeeze(part, 0) for part in jax.lax.split(leaf, [1] * length)] for leaf in leaves), strict=True
    )
    return [jax.tree.unflatten(structure, layer) for layer in layers]


def join_layers(layers: Sequence):
    """The inverse of `split_layers`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def apply_stacks(
    layer_fn: Callable, stacks: Sequence, x: jax.Array, per_layer: Sequence | None, *, scan: bool, remat: str
):
    """Applies all layers in order.

    Args:
      layer_fn: `(layer, x, extra, number) -> (x, output)`; `number` is the layer's, counted over all stacks.
      stacks: stacked layers.
      x: the activations that run through.
      per_layer: for each stack a pytree with a leading layer axis (caches), or `None`.
      scan: one `jax.lax.scan` per stack (compile time independent of depth) instead of unrolled layers.
      remat: a name in `REMAT_POLICIES`.

    Returns:
      `x` and, for each stack, the outputs of its layers, stacked.
    """
    if remat not in REMAT_POLICIES:
        raise InputError(f"remat={remat!r} is unknown; expected one of {', '.join(REMAT_POLICIES)}")
    if REMAT_POLICIES[remat] is not None:
        layer_fn = jax.checkpoint(layer_fn, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    outputs, first = [], 0
    for i, stack in enumerate(stacks):
        extra = None if per_layer is None else per_layer[i]
        length = num_layers(stack)
        numbers = first + jnp.arange(length)
        if scan and length > 1:

            def body(x, layer_and_extra):
                layer, extra, number = layer_and_extra
                return layer_fn(layer, x, extra, number)

            x, output = jax.lax.scan(body, x, (stack, extra, numbers))
        else:
            layer_outputs = []
            extras = [None] * length if extra is None else split_layers(extra)
            for layer, layer_extra, number in zip(split_layers(stack), extras, numbers, strict=True):
                x, layer_output = layer_fn(layer, x, layer_extra, number)
                layer_outputs.append(layer_output)
            output = join_layers(layer_outputs)
        outputs.append(output)
        first += length
    return x, outputs


def unstack(stacks: Sequence) -> nnx.List:
    """The same layers as stacks of one: decoding reads per-layer weights without slicing them in every step."""
    return nnx.List(
        [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], stack) for stack in stacks for i in range(num_layers(stack))]
    )
