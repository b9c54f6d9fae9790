"""The one training loop: initial state or resume, step, metrics, held-out loss, checkpoints, final model."""

import contextlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gqa import models
from gqa.checkpoints import hf_config, training_run
from gqa.checkpoints.hf_config import read_json
from gqa.checkpoints.store import Store
from gqa.convert import convert, converted_config
from gqa.convert.merging import merge_gradually
from gqa.data import loader
from gqa.errors import InputError
from gqa.objectives.language_model import Sums, cross_entropy
from gqa.sharding import logical_axes
from gqa.training import optimizer as optimizers
from gqa.training.config import MAY_CHANGE, RunConfig, flatten, to_json
from gqa.training.flops import train_step_flops
from gqa.training.metrics import MetricsWriter
from gqa.training.recipe import Recipe, make_recipe
from gqa.training.state import abstract_state, initial_state, jit_train_step, make_train_step, place_batch
from gqa.training.teacher import Teacher, distillation_loss

CONFIG = "config.json"
FINISHED = "finished.json"
MODEL = "model"
ADAPTER = "adapter"
UNFINISHED = "unfinished"  # where the final model is written before it gets its name


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped, its state saved."""


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
) -> dict[str, float]:
    """Loss in nats a token, accuracy and tokens scored, or what a `recipe` scores; one transfer from the devices."""
    steps = tqdm(range(len(batches)), desc="held-out", unit="batch", disable=not show_progress, dynamic_ncols=True)
    score, added = (recipe.heldout_sums or _heldout_sums, recipe.added) if recipe else (_heldout_sums, None)
    sums = []
    with jax.set_mesh(mesh):
        for step in steps:
            batch = batches(step)
            placed = place_batch(mesh, batch)
            sums.append(score(model, added("heldout", batch, placed) if added else placed))
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
    initial_model: models.Model | Callable[[], models.Model],
    token_ids: Mapping[str, int | list[int]] | None,
    records: Path,
    export: Callable[[models.Model, Path], None],
    teacher: models.Model | None = None,
) -> models.Model:
    """Trains to the end, going on from the newest checkpoint in `workdir` if there is one.

    Args:
      config: the run; written to `config.json`, and every later start must agree with it.
      workdir: gets `config.json`, `architecture.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the end,
        `model/`, and `adapter/` where one was trained.
      mesh: the devices.
      architecture: the model's configuration.
      initial_model: the model of step 0, or a function that initialises one in place.
      token_ids: of its padding, end and so on, written with the architecture; `None`: the family's usual ones.
      records: folder of prepared records.
      export: writes the final model into a folder.
      teacher: where the run distils.

    Raises `InputError` when the folder holds another or a finished run, `Interrupted` after a signal.
    """
    abstract_model = models.abstract(architecture)
    merged, finish = _merging(config, architecture)
    recipe = make_recipe(config, abstract_model, initial_model, records, mesh)
    learning_rate = optimizers.schedule(config.optimizer)
    optimizer = optimizers.optimizer(config.optimizer, config.schedule_offset, logical_axes(recipe.trained))
    dropout = config.model.dropout_rate > 0
    loss_fn = recipe.loss_fn or language_model_loss(config.train.z_loss, dropout)
    if teacher is not None:
        loss_fn = distillation_loss(config.distillation, config.train.z_loss, dropout)
    train_step = make_train_step(
        lambda model, batch, key, step, *frozen: loss_fn(
            merged(recipe.whole(model, key, *frozen), step), batch, key, step
        ),
        optimizer,
        lambda step: learning_rate(step + config.schedule_offset),
        accumulation=config.train.accumulation,
        seed=config.train.seed,
    )
    batches = loader.train_batches(records, config.train.batch_size, config.train.seed)
    heldout = loader.heldout_batches(records, config.train.batch_size, config.train.eval_examples)
    shapes = {name: array.shape for name, array in batches(0).items()}
    flops = train_step_flops(abstract_model, shapes)
    if teacher is not None:
        said = Teacher(config, teacher, architecture, batches.manifest.corpus_digests)
        flops += train_step_flops(teacher, shapes) // 3  # forward only
    claim(workdir, config)
    # So that what is saved can be read as a checkpoint without the code and the files that the run was started with.
    written = hf_config.write(architecture, architecture.param_dtype, token_ids)
    _write_json(workdir / training_run.ARCHITECTURE, written)

    def scored(state):
        return merged(recipe.whole(state.model, None, *recipe.frozen), state.step)

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store(workdir / "checkpoints", config.train.keep))
        signals = stack.enter_context(_Signals())
        stack.enter_context(jax.set_mesh(mesh))
        like = abstract_state(recipe.trained, optimizer, mesh)
        train_step = jit_train_step(train_step, like)
        start = store.latest_step()
        if start is not None and start > config.steps:
            raise InputError(
                f"workdir {workdir} holds {start} steps already, the config says {config.steps}; choose more"
            )
        state = initial_state(recipe.initial(), optimizer, like) if start is None else store.restore(start, like)
        del initial_model  # not kept beside the state
        recipe = recipe._replace(initial=None)
        writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, start)))
        if start is None:
            start = 0
            writer.write(0, "heldout", heldout_metrics(scored(state), heldout, mesh, recipe=recipe))
        progress = stack.enter_context(contextlib.closing(_Progress(start, config.steps, flops)))
        for step, batch in enumerate(batches.prefetch(start, config.steps, depth=2), start + 1):
            placed = place_batch(mesh, batch)
            if teacher is not None:
                placed = said(step - 1, placed)
            if recipe.added is not None:
                placed = recipe.added("train", batch, placed)
            state, metrics = train_step(state, placed, *recipe.frozen)
            last = step == config.steps
            if last or step % config.train.log_every == 0:
                # The one transfer from the devices in the loop; the step itself never waits for the host.
                writer.write(step, "train", progress.report(step, batch, jax.device_get(metrics)))
            if last or step % config.train.eval_every == 0:
                scores = heldout_metrics(scored(state), heldout, mesh, recipe=recipe)
                writer.write(step, "heldout", scores)
                progress.heldout(step, scores["loss"])
            if last or signals.received or step % config.train.save_every == 0:
                store.save(step, state)
            if signals.received and not last:
                store.wait()
                raise Interrupted(f"{signals.received} at step {step}: saved; the same command goes on from there")
        store.wait()
        model = finish(recipe.finish(state.model))
        _replace_model(workdir, lambda folder: export(model, folder))
        if recipe.export_adapter is not None:
            shutil.rmtree(workdir / ADAPTER, ignore_errors=True)  # of this run when it had fewer steps
            recipe.export_adapter(state.model, workdir / ADAPTER)
        _write_json(workdir / FINISHED, {"step": config.steps})
        return model


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


def claim(workdir: Path, config: RunConfig) -> None:
    """Makes `workdir` this run's, or raises `InputError` when it holds a finished or another run, or something else."""
    wanted = to_json(config)
    found = read_json(workdir / CONFIG) if (workdir / CONFIG).exists() else {}
    if "train" not in found:
        # A kill may have left the unfinished config of this very call.
        if workdir.exists() and {path.name for path in workdir.iterdir()} - {_unfinished(Path(CONFIG)).name}:
            raise InputError(f"workdir {workdir} is not empty and holds no run; choose a new folder")
        workdir.mkdir(parents=True, exist_ok=True)
        _write_json(workdir / CONFIG, wanted)
        return
    found, expected = flatten(found), flatten(wanted)
    for name in sorted({*found, *expected} - set(MAY_CHANGE)):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"workdir {workdir} holds a run with {name}={found.get(name)!r}, this one has {expected.get(name)!r}; "
                "choose another folder or the same value"
            )
    if (workdir / FINISHED).exists():
        steps = read_json(workdir / FINISHED)["step"]
        if steps >= config.steps:
            raise InputError(
                f"workdir {workdir} holds a finished run of {steps} steps; choose another folder or more steps"
            )
        (workdir / FINISHED).unlink()


def _replace_model(workdir: Path, export: Callable[[Path], None]) -> None:
    unfinished = workdir / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed here
    export(unfinished / MODEL)
    shutil.rmtree(workdir / MODEL, ignore_errors=True)  # of this run when it had fewer steps
    (unfinished / MODEL).rename(workdir / MODEL)
    unfinished.rmdir()


def _write_json(path: Path, content: dict) -> None:
    _unfinished(path).write_text(json.dumps(content, indent=2) + "\n")
    os.replace(_unfinished(path), path)


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".tmp")


class _Signals:
    """Notes SIGINT and SIGTERM instead of dying, so that the step under way can end and be saved."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.received:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class _Progress:
    """The progress bar, and the rates that go into the metrics."""

    def __init__(self, start: int, steps: int, flops: int):
        self._bar = tqdm(total=steps, initial=start, unit="step", desc="train", dynamic_ncols=True, mininterval=1.0)
        self._flops = flops
        self._step, self._time = start, time.perf_counter()

    def report(self, step: int, batch: Mapping, metrics: dict) -> dict[str, float]:
        """Metrics of a step with its rates since the last report; also shown."""
        now = time.perf_counter()
        steps_per_second = (step - self._step) / (now - self._time)
        tokens = sum(int(np.count_nonzero(array)) for name, array in batch.items() if name.endswith("_segments"))
        metrics = {name: float(value) for name, value in metrics.items()}
        metrics |= {
            "tokens_per_second": tokens * steps_per_second,
            "model_tflops_per_second": self._flops * steps_per_second / 1e12,
            "memory_gib": _peak_memory() / 2**30,
        }
        self._bar.update(step - self._step)
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s")
        self._step, self._time = step, now
        return metrics

    def heldout(self, step: int, loss: float) -> None:
        """Shows a held-out loss; the time it took is no training time."""
        self._bar.write(f"step {step}: held-out loss {loss:.4f}")
        self._time = time.perf_counter()

    def close(self) -> None:
        self._bar.close()


def _peak_memory() -> int:
    """Most bytes in use so far: of the device where it tells, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
