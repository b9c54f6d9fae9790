"""The one training loop: initial state or resume, step, metrics, held-out loss, checkpoints, final model."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gqa import distributed, models
from gqa.checkpoints import hf_config, training_run
from gqa.checkpoints.store import Store
from gqa.convert import convert, converted_config
from gqa.convert.merging import merge_gradually
from gqa.data import loader
from gqa.errors import InputError
from gqa.objectives.language_model import Sums, cross_entropy
from gqa.sharding import logical_axes, rows_here
from gqa.training import optimizer as optimizers
from gqa.training import run_folder
from gqa.training.config import RunConfig
from gqa.training.flops import train_step_flops
from gqa.training.metrics import JSONL, MetricsWriter
from gqa.training.recipe import Recipe, make_recipe
from gqa.training.roll_back import RollBacks
from gqa.training.signals import Interrupted, Signals
from gqa.training.state import abstract_state, initial_state, jit_train_step, make_train_step, place_batch
from gqa.training.teacher import Teacher, distillation_loss
from gqa.training.watch import PROFILE, Profiler, Trace, Watch, Work, peak_tflops


def language_model_loss(z_loss: float, dropout: bool) -> Callable[[models.Model, Mapping, jax.Array, jax.Array], Sums]:
    """The objective of pre-training and uptraining: cross-entropy of the targets, summed over tokens."""

    def loss_fn(model, batch, key, step):
        logits_BTV = models.apply(model, batch, key if dropout else None)
        return cross_entropy(logits_BTV, batch["targets"], batch["loss_weights"], z_loss)

    return loss_fn


@jax.jit
def _heldout_sums(model: models.Model, batch: Mapping) -> Sums:
    logits_BTV = models.apply(model, batch)
    return cross_entropy(logits_BTV, batch["targets"], batch["loss_weights"], 0.0)


def heldout_metrics(
    model: models.Model,
    batches: loader.Batches,
    mesh: Mesh,
    show_progress: bool = False,
    recipe: Recipe | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Loss in nats a token, accuracy and tokens scored, or what a `recipe` scores; one transfer from the devices.

    Raises `Interrupted` between two batches once `stopping()`.
    """
    steps = tqdm(range(len(batches)), desc="held-out", unit="batch", disable=not show_progress, dynamic_ncols=True)
    score, added = (recipe.heldout_sums or _heldout_sums, recipe.added) if recipe else (_heldout_sums, None)
    sums = []
    with jax.set_mesh(mesh):
        for step in steps:
            if stopping():
                raise Interrupted
            batch = batches(step)
            placed = place_batch(mesh, batch)
            sums.append(score(model, added("heldout", batch, placed) if added else placed))
            jax.block_until_ready(sums[-2:-1])  # one batch ahead of the devices, not all
        sums = jax.device_get(sums)
    total = jax.tree.map(lambda *parts: float(np.sum(np.asarray(parts, np.float64))), *sums)
    return {
        "loss": total.loss_sum / total.weight_sum,
        "accuracy": total.correct_sum / total.weight_sum,
        "target_tokens": int(total.weight_sum),
        **{name: value / weight for name, (value, weight) in total.named.items() if weight},
    }


def train(
    config: RunConfig,
    workdir: Path,
    *,
    mesh: Mesh,
    architecture: models.ModelConfig,
    initial_model: Callable[[], models.Model | Callable[[], models.Model]],
    token_ids: Mapping[str, int | list[int]] | None,
    records: Path,
    export: Callable[[models.Model, Path], None],
    teacher: models.Model | None = None,
    trace: Trace | None = None,
) -> models.Model | None:
    """Trains to the end, going on from the newest intact checkpoint in `workdir` if there is one.

    Args:
      config: the run; written to `config.json`, and every later start must agree with it.
      workdir: gets `config.json`, `architecture.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the end,
        `model/`, and `adapter/` where one was trained; beside a base in few bits `adapter/` alone.
      mesh: the devices.
      architecture: the model's configuration.
      initial_model: gives the model of step 0, or a function that initialises one in place. A run that goes on does not
        ask, unless that model stays beside what is trained.
      token_ids: of its padding, end and so on, written with the architecture; `None`: the family's usual ones.
      records: folder of prepared records.
      export: writes the final model into a folder.
      teacher: where the run distils.
      trace: steps whose profile goes into `profile/`.

    In several processes all of them call it; the first writes the files, and returns the whole model where one is
    written.

    Raises `InputError` when the folder holds another or a finished run, or a living run has it, and `Interrupted` after
    a signal.
    """
    abstract_model = models.abstract(architecture)
    merged, finish = _merging(config, architecture)
    initial_model = functools.cache(initial_model)
    if not training_run.has_steps(workdir):
        initial_model()  # one that does not load is refused before the folder is touched
    recipe = make_recipe(config, abstract_model, initial_model, records, mesh)
    learning_rate = optimizers.schedule(config.optimizer)
    optimizer = optimizers.optimizer(config.optimizer, config.schedule_offset, logical_axes(recipe.trained))
    dropout = config.model.dropout_rate > 0
    loss_fn = recipe.loss_fn or language_model_loss(config.train.z_loss, dropout)
    if teacher is not None:
        loss_fn = distillation_loss(config.distillation, config.train.z_loss, dropout)

    def loss_of_trained(trained, batch, key, step, *frozen):
        return loss_fn(merged(recipe.whole(trained, key, *frozen), step), batch, key, step)

    train_step = make_train_step(
        loss_of_trained,
        optimizer,
        lambda step: learning_rate(step + config.schedule_offset),
        accumulation=config.train.accumulation,
        seed=config.train.seed,
        skip_above=config.train.skip_above,
    )
    batch_size, rows = config.train.batch_size, rows_here(mesh, config.train.batch_size)
    batches = loader.train_batches(records, batch_size, config.train.seed, rows=rows)
    heldout = loader.heldout_batches(records, batch_size, config.train.eval_examples, rows=rows)
    shapes = {name: (batch_size, *array.shape[1:]) for name, array in batches(0).items()}
    frozen, scores = config.adapter is not None, config.reward is not None
    flops = train_step_flops(abstract_model, shapes, frozen, scores=scores)
    if config.dpo is not None and config.dpo.reference == "live":
        flops += train_step_flops(abstract_model, shapes) // 3  # forward only
    said = None
    if teacher is not None:
        said = Teacher(config, teacher, architecture, batches.manifest.corpus_digests)
        flops += train_step_flops(teacher, shapes) // 3  # forward only

    with contextlib.ExitStack() as stack:
        mirror = config.train.mirror and Path(config.train.mirror)
        folders = {"workdir": workdir} | ({"train.mirror": mirror} if mirror else {})

        def open_folders() -> None:
            for what, folder in folders.items():  # before a lock is left in a folder that is not ours
                run_folder.check(folder, config, what)
            if mirror:  # likewise
                run_folder.make(mirror, "train.mirror")
            stack.enter_context(run_folder.locked(workdir))
            for what, folder in folders.items():
                run_folder.claim(folder, config, what)
            # So that what is saved can be read as a checkpoint without the code and files that the run started with.
            written = hf_config.write(architecture, architecture.param_dtype, token_ids)
            run_folder.write_json(workdir / training_run.ARCHITECTURE, written)

        distributed.on_primary(open_folders)
        kept = dict(keep=config.train.keep, keep_minutes=config.train.keep_minutes, mirror=mirror)
        store = stack.enter_context(Store(workdir / training_run.STEPS, **kept))
        signals = stack.enter_context(Signals())
        stack.enter_context(jax.set_mesh(mesh))
        like = abstract_state(recipe.trained, optimizer, mesh)
        train_step = jit_train_step(train_step, like)
        newest = store.latest_step()
        if newest is not None and newest > config.steps:
            raise InputError(
                f"workdir {workdir} holds {newest} steps already, the config says {config.steps}; choose more"
            )
        found = store.restore_newest(like)
        step, state = found or (0, initial_state(recipe.initial(), optimizer, like))
        facts = store.facts(step) if found else {}
        writer = MetricsWriter(workdir, step, store.folder(step)) if found else MetricsWriter(workdir, None)
        stack.callback(lambda: writer.close())  # whichever it is then
        store.thin(writer.losses)
        del initial_model, found  # not kept beside the state
        recipe = recipe._replace(initial=None)
        started = facts.get("started", run_folder.started(workdir))
        work = Work(config.steps, flops, len(rows) / batch_size, peak_tflops(config.train.peak_tflops), started)
        watch = Watch(step, facts.get("useful_seconds", 0.0), int(jax.device_get(state.health.skipped)), work)
        stack.enter_context(contextlib.closing(watch))
        profiler = stack.enter_context(contextlib.closing(Profiler(trace, step, workdir / PROFILE, watch.say)))
        roll_backs = RollBacks(store, like)

        def is_due(every: int) -> bool:
            return step == config.steps or step % every == 0

        def told_to_stop() -> bool:
            return signals.received is not None and step < config.steps

        def score() -> None:
            watch.settle()
            model = merged(recipe.whole(state.model, None, *recipe.frozen), state.step)
            # Where a signal cuts it short, the next start makes up for it; the last step's lets the run end.
            with contextlib.suppress(Interrupted):
                scores = heldout_metrics(model, heldout, mesh, recipe=recipe, stopping=told_to_stop)
                writer.write(step, "heldout", scores)
                watch.say(f"step {step}: held-out loss {scores['loss']:.4f}")
            watch.resume()

        def save() -> None:
            with watch.saving():
                facts = {"useful_seconds": watch.useful_seconds, "started": started}
                store.save(step, state, losses=writer.losses, files=[workdir / JSONL], facts=facts)

        stack.enter_context(distributed.leaving_at_once())
        if is_due(config.train.eval_every) and step not in writer.losses:
            score()
        batch_index = int(jax.device_get(state.batch))
        feed = batches.prefetch(batch_index, batch_index + config.steps - step, depth=2)
        while step < config.steps and not signals.received:
            with watch.waiting_for_data():
                batch = next(feed)
            placed = place_batch(mesh, batch)
            if said is not None:
                placed = said(batch_index, placed)
            if recipe.added is not None:
                placed = recipe.added("train", batch, placed)
            step, batch_index = step + 1, batch_index + 1
            signals.look(batch_index)
            with profiler.step(step, watch):
                state, metrics = train_step(state, placed, *recipe.frozen)
            watch.step(metrics)
            if is_due(config.train.log_every):
                watch.settle()
                # The one transfer from the devices in the loop; the step itself never waits for the host.
                metrics = jax.device_get(metrics)
                writer.write(step, "train", watch.report(step, batch, metrics))
                in_a_row, limit = int(metrics["skipped_in_a_row"]), config.train.roll_back_after
                if limit is not None and in_a_row >= limit:
                    state = None  # not kept beside the one that is restored
                    step, state = roll_backs.back(step - in_a_row, batch_index)
                    watch.say(f"{in_a_row} updates left out in a row: back to step {step}, on with other batches")
                    writer.close()
                    writer = MetricsWriter(workdir, step, store.folder(step))
                    watch.back_to(step, store.facts(step)["useful_seconds"], int(jax.device_get(state.health.skipped)))
                    feed = batches.prefetch(batch_index, batch_index + config.steps - step, depth=2)
                    continue
            if is_due(config.train.eval_every):
                score()
            if signals.received or is_due(config.train.save_every):
                save()
        store.wait()
        if signals.received and step < config.steps:
            raise Interrupted(f"{signals.received} {_what_is_saved(step, store.latest_step())}")
        # A program over all devices is run by all processes, files are written by the first.
        trained = None if recipe.export_adapter is None else distributed.gathered(state.model)
        model = None if recipe.finish is None else distributed.gathered(recipe.finish(state.model))
        model = None if model is None else finish(model)

        def write_model() -> None:
            if recipe.export_adapter is not None:
                run_folder.replace(workdir, run_folder.ADAPTER, lambda folder: recipe.export_adapter(trained, folder))
            if model is not None:
                run_folder.replace(workdir, run_folder.MODEL, lambda folder: export(model, folder))
            run_folder.write_json(workdir / run_folder.FINISHED, {"step": config.steps})

        distributed.on_primary(write_model)
        watch.say(watch.summary(step, writer.losses))
        return model


def _what_is_saved(step: int, saved: int | None) -> str:
    if step == 0 or saved is None:
        return f"at step {step}: nothing is saved; the same command starts again"
    if saved == step:
        return f"at step {step}: saved; the same command goes on from there"
    return f"at step {step}: could not be saved; the same command goes on from step {saved}"


def _merging(config: RunConfig, architecture: models.ModelConfig) -> tuple[Callable, Callable]:
    """`(model, step) -> ` the model that a step trains, and `model -> ` the final one; both are the model itself
    unless heads are merged."""
    if config.uptrain is None or config.uptrain.merge is None:
        return (lambda model, step: model), (lambda model: model)
    kv_heads, steps = dict(config.uptrain.merge.kv_heads), config.uptrain.merge.steps
    converted_config(architecture, kv_heads, "mean")  # refuses what cannot be
    if steps > config.steps:
        raise InputError(f"uptrain.merge.steps={steps}; expected at most the run's {config.steps}")

    @jax.jit
    def merged(model, step):
        return merge_gradually(model, kv_heads, jnp.minimum(step / steps, 1.0))

    return merged, lambda model: convert(model, kv_heads, "mean", jax.random.key(0))
