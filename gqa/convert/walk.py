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
from gqa.nn.attention import GroupedQueryAttention

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
        # On the device once, not once for each program that takes them.
        leaves = [jnp.asarray(read(f"{prefix}{name}"), jnp.float32) for name in parameter_names(module)]
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
    missed: float  # ‖z W_O - y‖² with the converted attention's W_O
    tokens: float

    def error(self, missed: float) -> float:
        """`‖z W - y‖ / ‖y‖` of a kernel that misses y by the square `missed`."""
        return float(np.sqrt(max(missed, 0.0) / self.yy)) if self.yy > 0 else 0.0


class Stream:
    """The activations of calibration rows before the next layer of one side."""

    def __init__(self, shell: models.Model, side: str, batches: Sequence[Mapping], encoded: Sequence | None):
        self._shell, self.side, self._batches = shell, side, batches
        self._encoded = encoded or [None] * len(batches)
        # Head outputs `[B, T, H, d]` of the next layer's attentions that are converted already: by batch and name.
        self._heads: list[dict[str, jax.Array]] = [{} for _ in batches]
        self._number = 0  # of the next layer
        tokens = "inputs" if side == "encoder" else "decoder_inputs"
        self._x = [_embed(shell, batch[tokens]) for batch in batches]

    def observe(self, layer: nnx.Module, names: tuple[str, ...]) -> list[np.ndarray]:
        """The activations go through `layer`; the moment sums of what the queries of its attentions `names` read.

        Moment sums are the sum of `[x, 1]ᵀ[x, 1]` over real tokens, `[D + 1, D + 1]` float64. In self-attention keys
        and values read the same; in cross-attention see `encoded_sums`.
        """
        sums = [0.0] * len(names)
        for number, arguments in enumerate(self.arguments((layer,))):
            heads, self._heads[number] = self._heads[number], {}
            self._x[number], found = _observe(*arguments, heads, side=self.side, names=names)
            sums = [total + np.asarray(part, np.float64) for total, part in zip(sums, found, strict=True)]
        self._number += 1
        return sums

    def encoded_sums(self) -> np.ndarray:
        """Moment sums of what the keys and values of every cross-attention read."""
        pairs = zip(self._encoded, self._batches, strict=True)
        return sum(np.asarray(_moment_sums(x, real_tokens(batch, "encoder")), np.float64) for x, batch in pairs)

    def fit_sums(self, layer: nnx.Module, converted: GroupedQueryAttention, name: str) -> FitSums:
        """Of attention `name` of `layer` and of `converted` in its place, on the same activations.

        The layer that the activations then go through has `converted` there, but for its output's kernel: its heads are
        not computed again. Raises `InputError`, naming the layer, where outputs are not finite.
        """

        sums = [0.0] * len(FitSums._fields)
        for heads, arguments in zip(self._heads, self.arguments((layer, converted)), strict=True):
            known = {other: array for other, array in heads.items() if other != name}
            zz, zy, y, made, tokens, heads[name] = _fit_sums(*arguments, known, side=self.side, name=name)
            # Each batch's sums in float32 on the device, all batches' in float64.
            found = [np.asarray(part, np.float64) for part in (zz, zy, *_squares(y, made), tokens)]
            for part in found:
                check_finite(part, f"outputs of {self.side}.{self._number}.{name} on the calibration text")
            sums = [total + part for total, part in zip(sums, found, strict=True)]
        return FitSums(*sums)

    def advance(self, layer: nnx.Module) -> None:
        """The activations go through `layer`."""
        self.observe(layer, ())

    def encoded(self) -> list[jax.Array]:
        """The encoder's outputs, after its last layer."""
        return [_encoder_norm(self._shell, x) for x in self._x]

    def arguments(self, layers: tuple) -> Iterator[tuple]:
        for x, batch, encoded in zip(self._x, self._batches, self._encoded, strict=True):
            yield (self._shell, *layers, x, batch, encoded)


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
        return self.attention.project_key_value(x)

    def attend(self, *arguments, **keywords):
        self.heads = self.attention.attend_heads(*arguments, **keywords)
        self.output = self.attention.project_out(self.heads)
        return self.output


class _Known:
    """Stands where an attention stood whose head outputs are known; what made them XLA leaves out as unused."""

    def __init__(self, attention, heads):
        self.attention, self.heads = attention, heads
        self.project_query, self.project_key_value = attention.project_query, attention.project_key_value

    def attend(self, *_, **__):
        return self.attention.project_out(self.heads)


def _layer_fn(shell: models.Model, side: str, batch: Mapping, encoded) -> Callable:
    if side == "encoder":
        return shell.encoder_layer_fn(batch["inputs"].shape[1], batch["inputs_segments"])
    T, segments = batch["decoder_inputs"].shape[1], batch["targets_segments"]
    if isinstance(shell, models.t5.T5):
        return shell.decoder_layer_fn(T, encoded, batch["inputs_segments"], segments)
    return shell.decoder_layer_fn(T, segments, batch.get("prefix"))


def recorded(
    shell, layer, x, batch, encoded, side: str, attentions: Mapping, heads: Mapping[str, jax.Array] | None = None
) -> tuple[jax.Array, list[_Recorder]]:
    """What comes out of `layer`, and what its `attentions`, by name, read and made.

    Of other attentions the outputs of `heads` may be known.
    """
    layer = jax.tree.map(lambda leaf: leaf, layer)
    recorders = [_Recorder(attention) for attention in attentions.values()]
    known = {name: _Known(getattr(layer, name), each) for name, each in (heads or {}).items()}
    for name, stand_in in (*zip(attentions, recorders, strict=True), *known.items()):
        # Past nnx's bookkeeping: the layer is a copy that lives for this trace only.
        object.__setattr__(layer, name, stand_in)
    return _layer_fn(shell, side, batch, encoded)(layer, x, None, 0)[0], recorders


def real_tokens(batch: Mapping, side: str) -> jax.Array:
    """Which tokens of a side are no padding, `[N]`."""
    return (batch["inputs_segments" if side == "encoder" else "targets_segments"] != 0).reshape(-1)


@jax.jit
def _embed(shell, tokens):
    return shell.embed(tokens)


@jax.jit
def _encoder_norm(shell, x):
    return shell.encoder_norm(x)


@jax.jit
def _moment_sums(inputs, real):
    flat = inputs.astype(jnp.float32).reshape(len(real), -1)
    flat = jnp.concatenate([flat, jnp.ones((len(real), 1))], axis=1) * real[:, None]
    return _product_of_columns(flat, flat)


def _product_of_columns(left: jax.Array, right: jax.Array) -> jax.Array:
    """`leftᵀ right`. CPUs take twice the time to multiply by a transpose that they read as they go."""
    return jnp.matmul(jax.lax.optimization_barrier(left.T), right, precision="highest")


@partial(jax.jit, static_argnames=("side", "names"))
def _observe(shell, layer, x, batch, encoded, heads, side, names):
    attentions = {name: getattr(layer, name) for name in names}
    x, recorders = recorded(shell, layer, x, batch, encoded, side, attentions, heads)
    return x, [_moment_sums(recorder.query_inputs, real_tokens(batch, side)) for recorder in recorders]


@partial(jax.jit, static_argnames=("side", "name"))
def _fit_sums(shell, layer, converted, x, batch, encoded, heads, side, name):
    real = real_tokens(batch, side)[:, None]
    # XLA computes once what both read: before the attention the layers are the same.
    (teacher,), (student,) = (
        recorded(shell, layer, x, batch, encoded, side, {name: attention}, heads)[1]
        for attention in (getattr(layer, name), converted)
    )
    y, z, made = (
        array.astype(jnp.float32).reshape(len(real), -1) * real
        for array in (teacher.output, student.heads, student.output)
    )
    return *(_product_of_columns(z, other) for other in (z, y)), y, made, jnp.sum(real), student.heads


@jax.jit
def _squares(y, made):
    # Not in the program above: fused with their sum, XLA's products on CPUs take six times as long.
    return jnp.sum(y * y), jnp.sum(jnp.square(made - y))
