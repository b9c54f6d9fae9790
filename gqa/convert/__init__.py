"""Conversion of a model to fewer key/value heads.

`convert` applies the paper's methods (`METHODS`: a function `(attention, statistics, num_kv_heads, key) -> attention`
of one layer's attention) to a model in memory, inside or outside of `jax.jit`; `convert_calibrated` those that look at
what the heads do (`calibrated.Method`); `convert_lazily` either to a model that does not fit in memory.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqa import models
from gqa.convert import walk
from gqa.convert.calibrated import POOLED, Method, convert_layers
from gqa.convert.plan import Plan, make_plan, permuted_shell
from gqa.convert.pooling import layer_keys
from gqa.convert.statistics import Statistics
from gqa.errors import InputError
from gqa.models.heads import KVHeads, nearest_divisors, per_layer_kv_heads
from gqa.models.stacks import join_layers, num_layers, runs

METHODS: dict[str, Callable] = POOLED

# Where a model holds its attention sites: stacks -> site -> the attention of their layers.
_SITES = {
    "encoder": {"encoder_self": "self_attention"},
    "decoder": {"decoder_self": "self_attention", "cross": "cross_attention"},
}


def convert(model: models.Model, kv_heads: Mapping[str, KVHeads], method: str, key: jax.Array) -> models.Model:
    """A new model with `kv_heads` key/value heads at the named attention sites (GQA §2.1).

    Args:
      model: multi-head or grouped; left as it is. Other parameters of the new model are the same arrays.
      kv_heads: site -> its new number of key/value heads, one for all layers or one per layer; a number divides the
        layer's present one, and where it equals that the layer's attention is not touched. Sites left out stay.
      method: a name in `METHODS`.
      key: random key of methods that draw; a layer's draw depends on the site's and the layer's number alone.

    Returns:
      The model, its `config` changed accordingly and its layers in one stack per run of equal layers.

    Raises:
      InputError: for an unknown method or site, and for numbers that do not divide the present ones.
    """
    config = converted_config(model.config, kv_heads, method)
    if method not in METHODS:
        raise InputError(f"method={method!r} works on calibration text; expected one of {', '.join(METHODS)} here")
    sites = models.FAMILIES[models.family_of(config)].sites
    model = jax.tree.map(lambda leaf: leaf, model)
    model.config = config
    for stacks, attention_names in _SITES.items():
        if kv_heads.keys() & attention_names.keys():
            present = {attention: site for site, attention in attention_names.items() if site in sites}
            layer_kv_heads = {attention: config.kv_heads(site) for attention, site in present.items()}
            keys = {attention: layer_keys(config, site, key) for attention, site in present.items()}
            setattr(model, stacks, _convert_stacks(getattr(model, stacks), layer_kv_heads, METHODS[method], keys))
    return model


def converted_config(config: models.ModelConfig, kv_heads: Mapping[str, KVHeads], method: str) -> models.ModelConfig:
    """The architecture after `convert`; arguments and errors as of `convert`."""
    Method.parse(method)
    sites = models.FAMILIES[models.family_of(config)].sites
    targets = {}
    for site, wanted in kv_heads.items():
        if site not in sites:
            raise InputError(f"attention site {site!r} is unknown; expected one of {', '.join(sites)}")
        present = config.kv_heads(site)
        targets[site] = per_layer_kv_heads(wanted, len(present))
        _check(site, present=present, wanted=targets[site])
    return models.replace(config, **{f"{site}_kv_heads": _shortest(targets[site]) for site in targets})


def changed_sites(config: models.ModelConfig, new_config: models.ModelConfig) -> list[str]:
    """The attention sites with other numbers of key/value heads."""
    sites = models.FAMILIES[models.family_of(config)].sites
    return [site for site in sites if config.kv_heads(site) != new_config.kv_heads(site)]


def convert_calibrated(
    model: models.Model,
    kv_heads: Mapping[str, KVHeads],
    method: str,
    key: jax.Array,
    *,
    batches: Sequence[Mapping] | None = None,
    statistics: Statistics | None = None,
) -> tuple[models.Model, list[dict[str, Any]]]:
    """`convert` by a method that looks at what the heads do (`calibrated`), and for each attention what was kept.

    Args:
      model, kv_heads, key: as of `convert`.
      method: such as `svd+group+refit`.
      batches: calibration rows, arrays by name as `gqa.data.loader` makes them: for errors and the refit.
      statistics: of this model, `statistics.collect`; `None`: moments are assumed from the model's norms.

    Raises `InputError` as `convert` does, and where the architecture or the lack of text forbids the method.
    """
    new_config = converted_config(model.config, kv_heads, method)
    shell, load_layer = walk.shell_of(model), walk.layers_of(model)
    layers, reports = {side: [] for side in walk.sides(new_config)}, []
    plan, converted = _calibrated_layers(shell, load_layer, new_config, method, key, batches, statistics)
    for side, _, layer, report in converted:
        layers[side].append(layer)
        reports += report
    new_model = permuted_shell(shell, plan)
    for side, of_side in layers.items():
        shapes = [tuple(leaf.shape for leaf in jax.tree.leaves(layer)) for layer in of_side]
        stacks, first = [], 0
        for _, count in runs(shapes):
            stacks.append(join_layers(of_side[first : first + count]))
            first += count
        setattr(new_model, side, nnx.List(stacks))
    return new_model, reports


def convert_lazily(
    config: models.ModelConfig,
    read: Callable[[str], np.ndarray],
    kv_heads: Mapping[str, KVHeads],
    method: str,
    key: jax.Array,
    *,
    batches: Sequence[Mapping] | None = None,
    statistics: Statistics | None = None,
) -> tuple[models.ModelConfig, Callable[[str], np.ndarray], list[dict[str, Any]]]:
    """Conversion of a model that does not fit in memory: a layer or an attention at a time, when it is asked for.

    Args:
      config: of the model.
      read: gives a parameter of one layer by its path, `decoder.3.self_attention.key`, in our layout.
      kv_heads, method, key, batches, statistics: as of `convert_calibrated`.

    Returns:
      The new configuration, the new model's `read`, and a list that fills with what was kept. `read` keeps what it
      converted last, so layers are asked for in order and parameters of one attention one after the other; converted
      ones are float32.
    """
    new_config = converted_config(config, kv_heads, method)
    if not (Method.parse(method).calibrated or batches):
        return new_config, _read_pooled(config, new_config, read, kv_heads, method, key), []
    shell, load_layer = walk.read_lazily(config, read)
    plan, layers = _calibrated_layers(shell, load_layer, new_config, method, key, batches, statistics)
    new_shell, reports = permuted_shell(shell, plan), []
    outside = dict(zip(walk.parameter_names(new_shell), jax.tree.leaves(new_shell), strict=True))
    present: dict[str, np.ndarray] = {}

    def read_converted(path: str) -> np.ndarray:
        if path in outside:
            return np.asarray(outside[path])
        while path not in present:
            side, number, layer, report = next(layers)
            reports.extend(report)
            present.clear()
            names = (f"{side}.{number}.{name}" for name in walk.parameter_names(layer))
            present.update(zip(names, map(np.asarray, jax.tree.leaves(layer)), strict=True))
        return present[path]

    return new_config, read_converted, reports


def _calibrated_layers(shell, load_layer, new_config, method: str, key, batches, statistics):
    parsed = Method.parse(method)
    parsed.check(shell.config, changed_sites(shell.config, new_config), has_text=bool(batches))
    plan = Plan(new_config, {})
    if parsed.group:
        plan = make_plan(shell, load_layer, new_config, statistics)
    layers = convert_layers(shell, load_layer, plan, parsed, batches=batches, statistics=statistics, key=key)
    return plan, layers


def _read_pooled(
    config: models.ModelConfig,
    new_config: models.ModelConfig,
    read: Callable[[str], np.ndarray],
    kv_heads: Mapping[str, KVHeads],
    method: str,
    key: jax.Array,
) -> Callable[[str], np.ndarray]:
    abstract = models.abstract(config)
    numbers = {}  # path of a converted attention -> its site and layer
    for site in kv_heads:
        for layer, pair in enumerate(zip(config.kv_heads(site), new_config.kv_heads(site), strict=True)):
            if len(set(pair)) > 1:
                numbers[models.site_path(site, layer)] = (site, layer)
    modules = {site: models.site_attention(abstract, site)[0] for site in kv_heads}

    @functools.lru_cache(maxsize=1)
    def converted(prefix: str) -> dict[str, np.ndarray]:
        site, layer = numbers[prefix]
        names = walk.parameter_names(modules[site])
        arrays = [read(f"{prefix}.{name}").astype(np.float32) for name in names]
        attention = jax.tree.unflatten(jax.tree.structure(modules[site]), arrays)
        layer_key = layer_keys(config, site, key)[layer]
        attention = METHODS[method](attention, None, new_config.kv_heads(site)[layer], layer_key)
        return dict(zip(names, map(np.asarray, jax.tree.leaves(attention)), strict=True))

    def read_converted(path: str) -> np.ndarray:
        prefix = ".".join(path.split(".")[:3])
        return converted(prefix)[path.removeprefix(f"{prefix}.")] if prefix in numbers else read(path)

    return read_converted


def _check(site: str, *, present: Sequence[int], wanted: Sequence[int]) -> None:
    if len(wanted) != len(present):
        layers = len(present)
        raise InputError(
            f"{site}_kv_heads names {len(wanted)} layers, the model has {layers}; give 1 number or {layers}"
        )
    for layer, (number, available) in enumerate(zip(wanted, present, strict=True)):
        if number < 1 or available % number:
            raise InputError(
                f"{site}_kv_heads={number} does not divide the {available} key/value heads of layer {layer}; "
                f"nearest: {nearest_divisors(available, number)}"
            )


def _shortest(per_layer: tuple[int, ...]) -> KVHeads:
    return per_layer[0] if len(set(per_layer)) == 1 else per_layer


def _convert_stacks(
    stacks: Sequence, kv_heads: Mapping[str, Sequence[int]], method: Callable, keys: Mapping[str, jax.Array]
) -> nnx.List:
    """The layers of `stacks` with `kv_heads[attention][layer]`, in one stack per run of equal layers."""
    kinds = list(zip(*kv_heads.values(), strict=True))
    pieces, first = [], 0
    for stack in stacks:
        start, length = 0, num_layers(stack)
        for kind, count in runs(kinds[first : first + length]):
            piece = stack
            if count < length:  # a stack that stays whole is not sliced: that would copy all its parameters
                piece = jax.tree.map(lambda leaf, start=start, end=start + count: leaf[start:end], stack)
            layers = slice(first + start, first + start + count)
            for name, num_kv_heads in zip(kv_heads, kind, strict=True):
                piece = _convert_attention(piece, name, num_kv_heads, method, keys[name][layers])
            pieces.append((kind, piece))
            start += count
        first += length
    return nnx.List(
        [_concatenate([piece for _, piece in run]) for _, run in itertools.groupby(pieces, key=operator.itemgetter(0))]
    )


def _convert_attention(layers, name: str, num_kv_heads: int, method: Callable, keys: jax.Array):
    """Stacked `layers` with the attention called `name` converted; the same object where nothing is to do."""
    attention = getattr(layers, name)
    if attention.key.shape[-2] == num_kv_heads:
        return layers
    layers = jax.tree.map(lambda leaf: leaf, layers)
    setattr(layers, name, jax.vmap(lambda attention, key: method(attention, None, num_kv_heads, key))(attention, keys))
    return layers


def _concatenate(stacks: Sequence):
    """One stack of the layers of all."""
    return stacks[0] if len(stacks) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
