"""Model families by name: a row here and a file beside it add one."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from gqa.errors import InputError, nearest
from gqa.models import llama, t5

ModelConfig = t5.T5Config | llama.LlamaConfig
Model = t5.T5 | llama.Llama


class Family(NamedTuple):
    """What the rest of the library needs to know of a family."""

    config: type  # the dataclass of its architecture
    model: type  # the NNX module
    sites: tuple[str, ...]  # attention sites that have a number of key/value heads
    converted_sites: tuple[str, ...]  # sites converted by default (GQA §2.2: never the encoder)
    sizes: dict[str, ModelConfig]  # ready-made architectures


FAMILIES: dict[str, Family] = {
    "t5": Family(t5.T5Config, t5.T5, t5.SITES, ("decoder_self", "cross"), t5.SIZES),
    "llama": Family(llama.LlamaConfig, llama.Llama, llama.SITES, llama.SITES, llama.SIZES),
}


def family_of(config: ModelConfig) -> str:
    """The name of a configuration's family."""
    return next(name for name, family in FAMILIES.items() if isinstance(config, family.config))


def size(name: str) -> ModelConfig:
    """A ready-made architecture, such as `t5_1_1_base` or `llama_2_7b`."""
    sizes = {size: config for family in FAMILIES.values() for size, config in family.sizes.items()}
    if name not in sizes:
        raise InputError(f"no model size {name!r}; expected one of {', '.join(sizes)}")
    return sizes[name]


@functools.partial(jax.jit, static_argnums=0)
def create(config: ModelConfig, key: jax.Array) -> Model:
    """A freshly initialised model."""
    return FAMILIES[family_of(config)].model(config, key)


def abstract(config: ModelConfig) -> Model:
    """The model with shapes and dtypes in place of arrays: nothing is allocated."""
    leaves, structure = _traced(config)
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=32)
def _traced(config: ModelConfig) -> tuple[list[jax.ShapeDtypeStruct], jax.tree_util.PyTreeDef]:
    """What `abstract` is made of; tracing takes a tenth of a second, and a command asks several times."""
    return jax.tree.flatten(jax.eval_shape(lambda: create(config, jax.random.key(0))))


def num_parameters(model: Model) -> int:
    """Parameters of a model or of its abstract form."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def site_attention(model: Model, site: str) -> list:
    """For each stack, the attention of `site`: the modules that a conversion replaces."""
    stacks, name = site_stacks(model, site)
    return [getattr(stack, name) for stack in stacks]


def site_stacks(model: Model, site: str) -> tuple[Sequence, str]:
    """The stacks whose layers have an attention at `site`, and the attribute of theirs that holds it."""
    stacks = model.encoder if site == "encoder_self" else model.decoder
    return stacks, "cross_attention" if site == "cross" else "self_attention"


def site_path(site: str, layer: int) -> str:
    """Where the parameters of a layer's attention at `site` are: `decoder.3.cross_attention`."""
    side = "encoder" if site == "encoder_self" else "decoder"
    return f"{side}.{layer}.{'cross_attention' if site == 'cross' else 'self_attention'}"


def replace(config: ModelConfig, **changes) -> ModelConfig:
    """`dataclasses.replace`, validated again; raises `InputError` for a field that the architecture has not."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in changes:
        if name not in known:
            raise InputError(f"{type(config).__name__} has no {name!r}; nearest: {nearest(name, known)}")
    return dataclasses.replace(config, **changes)


def apply(model: Model, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None) -> jax.Array:
    """Logits `[B, T, V]` float32 for a batch's arrays by name, whatever the family.

    Reads `decoder_inputs`, `targets_segments` and, for an encoder-decoder, `inputs` and `inputs_segments`; for a
    decoder `prefix` where the batch has one.
    """
    if isinstance(model, t5.T5):
        return model(
            batch["inputs"],
            batch["decoder_inputs"],
            inputs_segments_BS=batch["inputs_segments"],
            decoder_segments_BT=batch["targets_segments"],
            dropout_key=dropout_key,
        )
    return model(
        batch["decoder_inputs"],
        decoder_segments_BT=batch["targets_segments"],
        prefix_BT=batch.get("prefix"),
        dropout_key=dropout_key,
    )
