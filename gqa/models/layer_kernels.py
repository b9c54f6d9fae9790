"""The kernels of a model's layers, one of each stack: what adapters stand beside and what is held in few bits.

A kernel is a parameter with logical axes, or a module with `shape`, `axes` and an `einsum` of its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from gqa.models import Model
from gqa.models.stacks import num_layers


def layer_kernels(model: Model) -> Iterator[tuple[str, Any]]:
    """Path and kernel of every linear map of the layers, in a fixed order: `decoder.0.self_attention.query`.

    The number is that of the stack.
    """
    for side in ("encoder", "decoder"):
        for number, stack in enumerate(getattr(model, side, ())):
            for name, part in sorted(vars(stack).items()):
                for attribute, kernel in sorted(vars(part).items()) if isinstance(part, nnx.Module) else ():
                    if "embed" in axes_of(kernel) and len(axes_of(kernel)) > 1:
                        yield f"{side}.{number}.{name}.{attribute}", kernel


def axes_of(kernel) -> tuple[str, ...]:
    """Logical axes of a kernel, without that of the layers; of what is none, as many as it has."""
    if isinstance(kernel, nnx.Variable):
        return kernel.get_metadata().get("axes", ())
    return getattr(kernel, "axes", ()) if isinstance(kernel, nnx.Module) else ()


def num_inputs(kernel) -> int:
    """Axes that are summed over: heads and their width of the attention's output, one of all others."""
    return 2 if axes_of(kernel)[0] in ("heads", "kv_heads") else 1


def with_kernels(model: Model, kernels: Mapping[str, Any]) -> Model:
    """The model with other kernels at some of the paths; all other arrays are shared."""
    model = jax.tree.map(lambda leaf: leaf, model)  # modules of its own, the same arrays
    for path, kernel in kernels.items():
        side, stack, name, attribute = path.split(".")
        setattr(getattr(getattr(model, side)[int(stack)], name), attribute, kernel)
    return model


def layer_numbers(model: Model, path: str) -> range:
    """The layers of the stack that `path` is in, counted over all stacks of its side."""
    side, stack, _ = path.split(".", 2)
    lengths = [num_layers(each) for each in getattr(model, side)[: int(stack) + 1]]
    return range(sum(lengths[:-1]), sum(lengths))


def layer_path(path: str, layer: int) -> str:
    """The path of one layer's kernel, as checkpoints name it: `decoder.3.self_attention.query`."""
    side, _, name = path.split(".", 2)
    return f"{side}.{layer}.{name}"


def by_layer_path(model: Model) -> dict[str, Any]:
    """The stacked kernel that each layer's kernel is in, by the path of the layer's."""
    return {
        layer_path(path, layer): kernel for path, kernel in layer_kernels(model) for layer in layer_numbers(model, path)
    }
