"""Calibration rows on their way through a model, one layer in memory at a time.

A *shell* is a model without its layers (embedding, norms, shared bias tables); layers come one by one from a function.
So a model of any size is observed in the memory of one layer and of the rows' activations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqa import models
from gqa.errors import InputError
from gqa.models.stacks import split_layers

LoadLayer = Callable[[str, int], nnx.Module]  # side, number of the layer -> the layer, not stacked

# Sides in the order in which rows pass them; for each the sites in the order of a layer, with their attention's name.
SIDES = {
    "encoder": {"encoder_self": "self_attention"},
    "decoder": {"decoder_self": "self_attention", "cross": "cross_attention"},
}


def sides(config: models.ModelConfig) -> dict[str, dict[str, str]]:
    """The sides and sites that a family has: side -> site -> name of its attention in a layer."""
    known = models.FAMILIES[models.family_of(config)].sites
    found = {side: {site: name for site, name in sites.items() if site in known} for side, sites in SIDES.items()}
    return {side: sites for side, sites in found.items() if sites}


def num_layers(config: models.ModelConfig, side: str) -> int:
    """Layers of a side."""
    return len(config.kv_heads("encoder_self" if side == "encoder" else "decoder_self"))


def num_all_layers(config: models.ModelConfig) -> int:
    """Layers of all sides."""
    return sum(num_layers(config, side) for side in sides(config))


def shell_of(model: models.Model) -> models.Model:
    """A model's copy without its layers."""
    shell = jax.tree.map(lambda leaf: leaf, model)
    for side in sides(model.config):
        setattr(shell, side, nnx.List([]))
    return shell


def layers_of(model: models.Model) -> LoadLayer:
    """`LoadLayer` of a model in memory."""
    layers = {
        side: [layer for stack in getattr(model, side) for layer in split_layers(stack)] for side in sides(model.config)
    }
    return lambda side, number: layers[side][number]


def read_lazily(config: models.ModelConfig, read: Callable[[str], np.ndarray]) -> tuple[models.Model, LoadLayer]:
    """Shell and layers, in float32, of a model of which `read` gives one layer's parameter by its path."""
    abstract = models.abstract(config)

    def filled(module, prefix: str):
        leaves = [read(f"{prefix}{name}").astype(np.float32) for name in parameter_names(module)]
        return jax.tree.unflatten(jax.tree.structure(module), leaves)

    def load_layer(side: str, number: int):
        # All stacks of a side have the same structure, whatever their numbers of heads.
        return filled(getattr(abstract, side)[0], f"{side}.{number}.")

    return filled(shell_of(abstract), ""), load_layer


def parameter_names(module) -> list[str]:
    """Dotted names of a module's parameters in the order of its leaves."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(module))
    return [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path in paths]


class FitSums(NamedTuple):
    """Sums over query tokens of a converted attention's head outputs z and of its teacher's output y; float64."""

    zz: np.ndarray  # [H * d, H * d]
    zy: np.ndarray  # [H * d, D]
    yy: float
    tokens: float

    def error(self, out: np.ndarray) -> float:
        """`‖z out - y‖ / ‖y‖` for a kernel `[H, d, D]`."""
        kernel = out.reshape(len(self.zz), -1)
        squared = self.yy - 2 * np.vdot(self.zy, kernel) + np.vdot(kernel, self.zz @ kernel)
        return float(np.sqrt(max(squared, 0.0) / self.yy)) if self.yy > 0 else 0.0


class Stream:
    """The activations of calibration rows before the next layer of one side."""

    def __init__(self, shell: models.Model, side: str, batches: Sequence[Mapping], encoded: Sequence | None):
        self._shell, self._side, self._batches = shell, side, batches
        self._encoded = encoded or [None] * len(batches)
        tokens = "inputs" if side == "encoder" else "decoder_inputs"
        self._x = [_embed(shell, batch[tokens]) for batch in batches]

    def moment_sums(self, layer: nnx.Module, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Sums of `[x, 1]ᵀ[x, 1]`, `[D + 1, D + 1]`, over what queries and over what keys of attention `name` read."""
        query, key_value = (sum(part) for part in zip(*self._sums(_moment_sums, layer, name=name), strict=True))
        return query, key_value

    def fit_sums(self, layer: nnx.Module, converted: nnx.Module, name: str) -> FitSums:
        """Of `layer` and of `converted`, which differ in attention `name`, on the same activations."""
        return FitSums(*(sum(part) for part in zip(*self._sums(_fit_sums, layer, converted, name=name), strict=True)))

    def advance(self, layer: nnx.Module) -> None:
        """The activations go through `layer`."""
        self._x = [_apply(*arguments, side=self._side) for arguments in self._arguments((layer,))]

    def encoded(self) -> list[jax.Array]:
        """The encoder's outputs, after its last layer."""
        return [_encoder_norm(self._shell, x) for x in self._x]

    def _arguments(self, layers: tuple) -> Iterator[tuple]:
        for x, batch, encoded in zip(self._x, self._batches, self._encoded, strict=True):
            yield (self._shell, *layers, x, batch, encoded)

    def _sums(self, function: Callable, *layers, name: str) -> Iterator[list[np.ndarray]]:
        # Each batch's sums in float32 on the device, all batches' in float64.
        for arguments in self._arguments(layers):
            yield [np.asarray(part, np.float64) for part in function(*arguments, side=self._side, name=name)]


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises `InputError` unless all of `array` is finite."""
    if not np.isfinite(array).all():
        raise InputError(f"{what} are NaN or infinite; check the checkpoint's weights")


class _Recorder:
    """Stands where an attention stood and keeps what it read and made."""

    def __init__(self, attention):
        self.attention = attention

    def project_query(self, x):
        self.query_inputs = x
        return self.attention.project_query(x)

    def project_key_value(self, x):
        self.key_value_inputs = x
        return self.attention.project_key_value(x)

    def attend(self, *arguments, **keywords):
        self.heads = self.attention.attend_heads(*arguments, **keywords)
        self.output = self.attention.project_out(self.heads)
        return self.output


def _layer_fn(shell: models.Model, side: str, batch: Mapping, encoded) -> Callable:
    if side == "encoder":
        return shell.encoder_layer_fn(batch["inputs"].shape[1], batch["inputs_segments"])
    T, segments = batch["decoder_inputs"].shape[1], batch["targets_segments"]
    if isinstance(shell, models.t5.T5):
        return shell.decoder_layer_fn(T, encoded, batch["inputs_segments"], segments)
    return shell.decoder_layer_fn(T, segments, batch.get("prefix"))


def _recorded(shell, layer, x, batch, encoded, side: str, name: str) -> _Recorder:
    layer = jax.tree.map(lambda leaf: leaf, layer)
    recorder = _Recorder(getattr(layer, name))
    # Past nnx's bookkeeping: the layer is a copy that lives for this trace only.
    object.__setattr__(layer, name, recorder)
    _layer_fn(shell, side, batch, encoded)(layer, x, None, 0)
    return recorder


def _real(batch: Mapping, side: str) -> jax.Array:
    """Which tokens of a side are no padding, `[N]`."""
    return (batch["inputs_segments" if side == "encoder" else "targets_segments"] != 0).reshape(-1)


@jax.jit
def _embed(shell, tokens):
    return shell.embed(tokens)


@jax.jit
def _encoder_norm(shell, x):
    return shell.encoder_norm(x)


@partial(jax.jit, static_argnames="side")
def _apply(shell, layer, x, batch, encoded, side):
    return _layer_fn(shell, side, batch, encoded)(layer, x, None, 0)[0]


@partial(jax.jit, static_argnames=("side", "name"))
def _moment_sums(shell, layer, x, batch, encoded, side, name):
    record = _recorded(shell, layer, x, batch, encoded, side, name)

    def sums(inputs, real):
        flat = inputs.astype(jnp.float32).reshape(len(real), -1)
        flat = jnp.concatenate([flat, jnp.ones((len(real), 1))], axis=1) * real[:, None]
        return jnp.matmul(flat.T, flat, precision="highest")

    queries = sums(record.query_inputs, _real(batch, side))
    if name != "cross_attention":
        return queries, queries
    return queries, sums(record.key_value_inputs, _real(batch, "encoder"))


@partial(jax.jit, static_argnames=("side", "name"))
def _fit_sums(shell, layer, converted, x, batch, encoded, side, name):
    real = _real(batch, side)[:, None]
    y = _recorded(shell, layer, x, batch, encoded, side, name).output.reshape(len(real), -1) * real
    z = _recorded(shell, converted, x, batch, encoded, side, name).heads.reshape(len(real), -1) * real
    multiply = partial(jnp.matmul, precision="highest")
    return multiply(z.T, z), multiply(z.T, y), jnp.sum(y * y), jnp.sum(real)
