"""What post-training changes about a run: which part of the model is trained, on what objective, and what comes out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gqa import models
from gqa.adapters import lora
from gqa.checkpoints import peft
from gqa.models import reward
from gqa.objectives.language_model import Sums
from gqa.training.config import RunConfig
from gqa.training.preferences import Reference, dpo_loss, reward_loss
from gqa.training.state import Batch

_ADAPTER_SEED = 2**31 - 1  # folded into the run's and the step's keys: an adapter shares no draw with a model


class Recipe(NamedTuple):
    """The loop's questions; `None` where a run is plain training."""

    trained: Any  # shapes of what the state holds
    initial: Callable[[], Any] | None  # that of step 0, or a function that makes it in place
    frozen: tuple  # what the step gets beside it
    whole: Callable[..., models.Model]  # (trained, dropout key or None, *frozen) -> the model that computes
    finish: Callable[[Any], models.Model] | None  # trained -> the final model, on its devices; None: there is none
    loss_fn: Callable[..., Sums] | None = None  # instead of the text's cross-entropy
    heldout_sums: Callable[[models.Model, Mapping], Sums] | None = None
    added: Callable[[str, Mapping, Batch], Batch] | None = None  # (split, batch, placed) -> placed with more arrays
    export_adapter: Callable[[Any, Path], None] | None = None


def make_recipe(
    config: RunConfig, abstract_model: models.Model, initial_model: Callable[[], Any], records: Path, mesh: Mesh
) -> Recipe:
    """The recipe of a run; arguments as of `loop.train`, whose caller has placed what `initial_model` gives."""
    dropout = config.model.dropout_rate > 0
    recipe = all_parameters(abstract_model, initial_model)
    if config.reward is not None:
        head_key = jax.random.key(config.train.seed)
        loss_fn, score = (reward_loss(config.reward, is_training) for is_training in (dropout, False))
        recipe = recipe._replace(
            trained=jax.eval_shape(reward.with_head, abstract_model, head_key),
            initial=lambda: reward.with_head(initial_model(), head_key),
            loss_fn=loss_fn,
            heldout_sums=jax.jit(lambda model, batch: score(model, batch, None, None)),
        )
    if config.dpo is not None:
        loss_fn, score = (dpo_loss(config.dpo, is_training) for is_training in (dropout, False))
        recipe = recipe._replace(
            loss_fn=loss_fn,
            heldout_sums=jax.jit(lambda model, batch: score(model, batch, None, None)),
            added=Reference(config.dpo, initial_model(), records, config.train.batch_size, mesh),
        )
    if config.adapter is not None:
        recipe = with_adapter(recipe, config, abstract_model, initial_model())
    return recipe


def all_parameters(abstract_model: models.Model, initial_model: Callable[[], Any] | None) -> Recipe:
    """Plain training."""
    return Recipe(
        trained=abstract_model,
        initial=initial_model,
        frozen=(),
        whole=lambda model, key: model,
        finish=lambda model: model,
    )


def with_adapter(recipe: Recipe, config: RunConfig, abstract_model: models.Model, base: models.Model) -> Recipe:
    """The recipe with adapters trained beside `base`, whose kernels are in few bits where the config says so.

    `abstract_model` is that of floats. Beside few bits no final model is made: of a large one, devices that train
    the adapter could not hold it; `checkpoints_tools.merge` makes it tensor by tensor.
    """
    settings = config.adapter
    key = jax.random.fold_in(jax.random.key(config.train.seed), _ADAPTER_SEED)

    def whole(adapters: lora.Adapters, dropout_key: jax.Array | None, base: models.Model) -> models.Model:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, _ADAPTER_SEED)
        return lora.attach(base, adapters, settings, key)

    merge = jax.jit(lambda base, adapters: lora.merge(base, adapters, settings))

    def export(adapters: lora.Adapters, directory: Path) -> None:
        said = peft.Settings(settings.rank, settings.alpha, settings.dropout_rate, settings.rank_stabilised)
        peft.save(directory, base.config, lora.by_layer(base, adapters), said, config.model.checkpoint)

    return recipe._replace(
        trained=lora.abstract(abstract_model, settings),
        initial=lambda: lambda: lora.create(abstract_model, settings, key),
        frozen=(base,),
        whole=whole,
        finish=(lambda adapters: merge(base, adapters)) if settings.base is None else None,
        export_adapter=export,
    )
