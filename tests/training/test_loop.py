"""Runs from beginning to end, through the command line's own function: learning, going on, uptraining, stopping."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gqa import checkpoints, evaluate, models, train
from gqa.checkpoints import hf
from gqa.checkpoints.store import Store
from gqa.convert import convert
from gqa.data import loader
from gqa.data.prepare import read_manifest
from gqa.errors import InputError
from gqa.sharding import logical_axes, make_mesh
from gqa.training import loop, metrics, run_folder
from gqa.training import optimizer as optimizers
from gqa.training.state import abstract_state
from gqa.training.watch import RATES

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture
def run(config_file, monkeypatch):
    """A function (workdir, family, dotted overrides) that trains, and returns the history without rates."""

    def run(workdir, family, overrides, *more):
        arguments = [f"--config={config_file(family, overrides)}", f"--workdir={workdir}", *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
        return [{name: value for name, value in line.items() if name not in RATES} for line in metrics.read(workdir)]

    return run


def last_state(workdir, config):
    """The newest checkpoint's state."""
    model = models.abstract(config.model.architecture())
    optimizer = optimizers.optimizer(config.optimizer, config.schedule_offset, logical_axes(model))
    like = abstract_state(model, optimizer, make_mesh(config.mesh))
    with Store(workdir / "checkpoints", config.train.keep) as store:
        return store.restore(store.latest_step(), like)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_model_learns(run, tiny_run, tmp_path, family):
    overrides = {"train.steps": 60, "train.log_every": 20, "train.eval_every": 30, "train.save_every": 60}
    with jax.transfer_guard("disallow"):
        history = run(tmp_path / "run", family, overrides)
    assert [(line["split"], line["step"]) for line in history] == [
        ("heldout", 0),
        ("train", 20),
        ("heldout", 30),
        ("train", 40),
        ("train", 60),
        ("heldout", 60),
    ]
    heldout = [line["loss"] for line in history if line["split"] == "heldout"]
    assert max(heldout[1:]) < heldout[0] - 0.5
    # Less than a model that knows how frequent each token is, and no more.
    assert heldout[2] < read_manifest(tiny_run(family).records).unigram_cross_entropy
    # The exported model is the one that was scored.
    config = tiny_run(family)
    model = checkpoints.load(tmp_path / "run" / "model", **config.model.run_choices())
    batches = loader.heldout_batches(config.records, 8, 8)
    assert loop.heldout_metrics(model, batches, make_mesh(config.mesh))["loss"] == pytest.approx(heldout[2], rel=1e-6)


def test_a_finished_run_goes_on_to_more_steps(run, tmp_path):
    overrides = {"train.eval_every": 5}
    whole = run(tmp_path / "whole", "llama", overrides | {"train.steps": 10})
    run(tmp_path / "parts", "llama", overrides | {"train.steps": 5})
    shorter = (tmp_path / "parts" / "model" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "parts" / "finished.json").read_text()) == {"step": 5}
    assert run(tmp_path / "parts", "llama", overrides | {"train.steps": 10}) == whole
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1] != shorter
    assert json.loads((tmp_path / "parts" / "finished.json").read_text()) == {"step": 10}
    assert sorted(os.listdir(tmp_path / "parts")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_run_that_goes_on_does_not_read_its_first_model_again(run, tiny_run, tmp_path, monkeypatch):
    hf.save(
        models.create(tiny_run("llama").model.architecture(), jax.random.key(3)), tmp_path / "first", dtype="float32"
    )
    read = []
    load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda path, **choices: read.append(path) or load(path, **choices))
    overrides = {"model.size": None, "model.changes": {}, "model.checkpoint": str(tmp_path / "first")}
    run(tmp_path / "run", "llama", overrides | {"train.steps": 2, "train.save_every": 2})
    assert read == [str(tmp_path / "first")]
    history = run(tmp_path / "run", "llama", overrides | {"train.steps": 4, "train.save_every": 2})
    assert read == [str(tmp_path / "first")] and history[-1]["step"] == 4


def test_uptraining_goes_on_where_pre_training_ended(run, tiny_run, tmp_path):
    """alpha = 0.0006 of 10,000 steps: 6 steps at 1/sqrt(10,000), 1/sqrt(10,001), …, on moments from zero."""
    multi_head = models.create(tiny_run("t5").model.architecture(), jax.random.key(3))
    converted = convert(multi_head, {"decoder_self": 1, "cross": 1}, "mean", jax.random.key(0))
    ids = {"pad_token_id": 0, "eos_token_id": [1, 7]}
    hf.save(converted, tmp_path / "converted", dtype="float32", token_ids=ids)
    overrides = {
        "model.size": None,
        "model.changes": {},
        "model.checkpoint": str(tmp_path / "converted"),
        "train.steps": None,
        "train.save_every": 4,
        "uptrain": {"original_steps": 10_000, "alpha": 0.0006},
    }
    history = run(tmp_path / "run", "t5", overrides)
    rates = [line["learning_rate"] for line in history if line["split"] == "train"]
    assert rates == pytest.approx([0.01, 0.0099995, 0.009999, 0.0099985, 0.009998, 0.0099975], rel=1e-6)
    state = last_state(tmp_path / "run", tiny_run("t5", overrides))
    assert int(state.step) == 6
    assert [int(leaf) for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == ()] == [6, 6]
    # Step 0 scores the converted model as it is.
    config = tiny_run("t5", overrides)
    batches = loader.heldout_batches(config.records, 8, 8)
    loss = loop.heldout_metrics(converted, batches, make_mesh(config.mesh))["loss"]
    assert history[0]["loss"] == pytest.approx(loss, rel=1e-6)
    # The exported model has the key/value heads that it was converted to.
    final = checkpoints.load(tmp_path / "run" / "model", **config.model.run_choices())
    assert final.config.decoder_self_kv_heads == final.config.cross_kv_heads == 1
    assert final.config.encoder_self_kv_heads == 8
    for folder in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoints"):
        assert checkpoints.read(folder, **config.model.run_choices()).token_ids == ids


def test_heads_merge_while_they_train(run, tiny_run, tmp_path):
    """The run starts as the multi-head model, and ends as what mean pooling makes of its heads then."""
    config = tiny_run("llama")
    multi_head = models.create(models.replace(config.model.architecture(), decoder_self_kv_heads=8), jax.random.key(3))
    hf.save(multi_head, tmp_path / "multi_head", dtype="float32")
    overrides = {
        "model.size": None,
        "model.changes": {},
        "model.checkpoint": str(tmp_path / "multi_head"),
        "train.steps": None,
        "uptrain": {"original_steps": 1000, "alpha": 0.01, "merge": {"kv_heads": {"decoder_self": 2}, "steps": 6}},
    }
    history = run(tmp_path / "run", "llama", overrides)
    batches, mesh = loader.heldout_batches(config.records, 8, 8), make_mesh(config.mesh)
    assert history[0]["loss"] == pytest.approx(loop.heldout_metrics(multi_head, batches, mesh)["loss"], rel=1e-6)
    final = checkpoints.load(tmp_path / "run" / "model", **config.model.run_choices())
    assert final.config.decoder_self_kv_heads == 2
    assert history[-1]["loss"] == pytest.approx(loop.heldout_metrics(final, batches, mesh)["loss"], rel=1e-5)
    with pytest.raises(InputError, match=r"uptrain\.merge\.steps=6; expected at most the run's 5"):
        run(tmp_path / "short", "llama", overrides | {"uptrain": overrides["uptrain"] | {"alpha": 0.005}})
    with pytest.raises(InputError, match="decoder_self_kv_heads=3 does not divide"):
        merge = {"kv_heads": {"decoder_self": 3}, "steps": 6}
        run(tmp_path / "wrong", "llama", overrides | {"uptrain": overrides["uptrain"] | {"merge": merge}})


@pytest.fixture
def distil(run, tiny_run, tmp_path):
    """A function (name of the workdir, family, distillation settings) -> the history of training a pooled model."""

    def distil(name, family, overrides=None, **settings):
        teacher, student = tmp_path / f"{family}-teacher", tmp_path / f"{family}-student"
        if not teacher.exists():
            model = models.create(tiny_run(family).model.architecture(), jax.random.key(3))
            hf.save(model, teacher, dtype="float32")
            kv_heads = dict.fromkeys(models.FAMILIES[family].converted_sites, 1)
            hf.save(convert(model, kv_heads, "mean", jax.random.key(0)), student, dtype="float32")
        weights = dict(text_weight=0.0, kl_weight=1.0, attention_weight=0.0, top_k=None, cache=None) | settings
        overrides = {
            "model.size": None,
            "model.changes": {},
            "model.checkpoint": str(student),
            "train.steps": 30,
            "train.z_loss": 0.0,
            "distillation": dict(teacher=str(teacher)) | weights,
        } | (overrides or {})
        return run(tmp_path / name, family, overrides)

    return distil


@pytest.mark.parametrize(("family", "attention_weight"), [("t5", 0.0), ("llama", 1.0)])
def test_a_student_nears_its_teacher(distil, family, attention_weight):
    """With the text's own weight 0: what is minimised is the divergence, and the error of attention outputs."""
    history = distil("run", family, attention_weight=attention_weight)
    missed = [line["added_loss"] + line["loss"] for line in history if line["split"] == "train"]
    assert np.mean(missed[-5:]) < 0.5 * np.mean(missed[:3])


def test_a_kept_teacher_says_what_a_live_one_says(distil, tmp_path):
    live = distil("live", "llama", top_k=5)
    cache = str(tmp_path / "cache")
    assert distil("first", "llama", top_k=5, cache=cache) == live
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 30
    assert distil("second", "llama", top_k=5, cache=cache) == live
    with pytest.raises(InputError, match="is of another teacher, text, seed, batch_size or top_k"):
        distil("third", "llama", top_k=6, cache=cache)
    (tmp_path / "cache" / "00000003.npz").write_bytes(b"half")
    with pytest.raises(InputError, match=r"00000003\.npz is damaged"):
        distil("fourth", "llama", top_k=5, cache=cache)


def test_what_a_teacher_said_of_other_batches_is_refused(distil, tmp_path, monkeypatch):
    """The same text, and targets of the same shape, of longer inputs."""
    monkeypatch.setenv("GQA_CACHE", str(tmp_path))
    overrides = {"train.steps": 1, "records": None, "data.targets_length": 24}
    settings = dict(top_k=5, cache=str(tmp_path / "cache"))
    distil("short", "t5", overrides, **settings)
    with pytest.raises(InputError, match=r"00000000\.npz is of another batch: other lengths"):
        distil("long", "t5", overrides | {"data.inputs_length": 48}, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kl_weight=0.0), "kl_weight and attention_weight are 0"),
        (dict(kl_weight=-1.0), r"distillation\.kl_weight=-1\.0; expected at least 0"),
        (dict(top_k=0), r"distillation\.top_k=0; expected at least 1"),
        (dict(top_k=10**6), r"distillation\.top_k=1000000; expected at most the vocabulary's"),
        (dict(cache="c"), "set top_k"),
        (dict(teacher="t5-teacher"), "distillation.teacher has family t5, the model llama"),
    ],
)
def test_distillation_that_cannot_be(distil, tmp_path, tiny_run, settings, message):
    if "teacher" in settings:
        settings = {"teacher": str(tmp_path / "other")}
        hf.save(
            models.create(tiny_run("t5").model.architecture(), jax.random.key(3)), settings["teacher"], dtype="float32"
        )
    with pytest.raises(InputError, match=message):
        distil("run", "llama", **settings)


@pytest.fixture
def signal_at(monkeypatch):
    """A function (step, signals, split) that makes the loop receive them while it writes the metrics of that step."""

    def arrange(step, numbers, split="train"):
        write = loop.MetricsWriter.write

        def write_and_receive(self, at, of, values):
            write(self, at, of, values)
            if (at, of) == (step, split):
                for number in numbers:
                    signal.raise_signal(number)

        monkeypatch.setattr(loop.MetricsWriter, "write", write_and_receive)

    return arrange


def test_a_signal_stops_the_run_after_the_step(run, tiny_run, config_file, signal_at, tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal_at(3, [signal.SIGTERM, signal.SIGTERM])  # as schedulers do
    with pytest.raises(loop.Interrupted, match=r"^SIGTERM at step 3: saved; the same command goes on from there$"):
        run(tmp_path / "run", "llama", {"train.steps": 10})
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["3"]
    assert not (tmp_path / "run" / "model").exists()
    # What it has is a checkpoint, with the vocabulary that it was trained on.
    config = tiny_run("llama")
    choices = config.model.run_choices()
    found = checkpoints.load(tmp_path / "run", **choices)
    assert found.config == config.model.architecture()
    expected = last_state(tmp_path / "run", config).model
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert checkpoints.read(tmp_path / "run", **choices).companions == [Path(config.data.vocabulary)]
    scores = tmp_path / "scores.json"
    arguments = [f"--config={config_file('llama')}", f"--checkpoint={tmp_path / 'run'}", f"--output={scores}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    evaluate.main()
    batches = loader.heldout_batches(config.records, 8, 8)
    loss = loop.heldout_metrics(expected, batches, make_mesh(config.mesh))["loss"]
    assert json.loads(scores.read_text())["loss"] == pytest.approx(loss, rel=1e-6)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_does_not_wait(run, signal_at, tmp_path):
    signal_at(3, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path / "run", "llama", {"train.steps": 10})
    assert not isinstance(caught.value, loop.Interrupted)
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


def test_a_signal_after_the_last_score_lets_the_run_end(run, signal_at, tmp_path):
    signal_at(10, [signal.SIGINT], "heldout")
    run(tmp_path / "run", "llama", {"train.steps": 10})
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_heldout_loss_does_not_depend_on_the_batch_size(tiny_run):
    config = tiny_run("llama")
    model = models.create(config.model.architecture(), jax.random.key(1))
    mesh = make_mesh(config.mesh)
    scores = [loop.heldout_metrics(model, loader.heldout_batches(config.records, size, 10), mesh) for size in (10, 4)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0]["target_tokens"] > 0
    assert abs(scores[0]["loss"] - math.log(256)) < 2  # an untrained model, near uniform over the vocabulary


def test_a_folder_with_more_steps_than_the_config_is_refused(run, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    run_folder.claim(workdir, tiny_run("llama", {"train.steps": 20}))
    with Store(workdir / "checkpoints", 2) as store:
        store.save(15, {"step": jax.numpy.int32(15)})
    with pytest.raises(InputError, match="holds 15 steps already, the config says 10; choose more"):
        run(workdir, "llama", {"train.steps": 10})
    assert os.listdir(workdir / "checkpoints") == ["15"]


def test_refusing_a_run_leaves_a_finished_one_finished(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    run_folder.claim(workdir, tiny_run("llama"))
    (workdir / "finished.json").write_text('{"step": 20}')
    with pytest.raises(InputError, match=r"holds a run with train\.seed=0, this one has 1"):
        run_folder.claim(workdir, tiny_run("llama", {"train.steps": 30, "train.seed": 1}))
    assert (workdir / "finished.json").exists()
    run_folder.claim(workdir, tiny_run("llama", {"train.steps": 30}))
    assert not (workdir / "finished.json").exists()


def test_a_kill_while_the_folder_was_claimed_does_no_harm(tiny_run, tmp_path):
    (tmp_path / "config.tmp").write_text('{"tra')
    run_folder.claim(tmp_path, tiny_run("llama"))
    assert os.listdir(tmp_path) == ["config.json"]


def steps_of(history, split):
    return [line["step"] for line in history if line["split"] == split]


def test_a_signal_while_scoring(run, tmp_path, monkeypatch):
    """Between two of three held-out batches at step 10: the run stops there, and the next start scores them first."""
    place_batch = loop.place_batch
    calls = []

    def place_and_receive(mesh, batch):
        calls.append(batch)
        if len(calls) == 3 + 10 + 1:
            signal.raise_signal(signal.SIGTERM)
        return place_batch(mesh, batch)

    monkeypatch.setattr(loop, "place_batch", place_and_receive)
    overrides = {"train.steps": 15, "train.eval_examples": 24}
    with pytest.raises(loop.Interrupted, match=r"^SIGTERM at step 10: saved; the same command goes on from there$"):
        run(tmp_path / "run", "llama", overrides)
    assert len(calls) == 3 + 10 + 1
    assert steps_of(metrics.read(tmp_path / "run"), "heldout") == [0]
    history = run(tmp_path / "run", "llama", overrides)
    assert steps_of(history, "heldout") == [0, 10, 15]
    assert steps_of(history, "train") == list(range(1, 16))


def test_updates_left_out_and_a_roll_back(run, tmp_path, monkeypatch, capsys):
    """Batch 3 and batches 11 and 12 are not finite: one is left out, two in a row lead back to step 10."""
    prefetch = loader.Batches.prefetch

    def poisoned(self, start, stop, depth):
        for index, batch in enumerate(prefetch(self, start, stop, depth), start):
            weights = batch["loss_weights"] * (np.nan if index in (3, 11, 12) else 1)
            yield batch | {"loss_weights": weights.astype(np.float32)}

    monkeypatch.setattr(loader.Batches, "prefetch", poisoned)
    overrides = {"train.roll_back_after": 2, "train.peak_tflops": 0.5}
    history = run(tmp_path / "run", "llama", overrides)
    lines = [line for line in history if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["batch"] for line in lines] == [*range(10), *range(13, 23)]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0] + [1] * 17
    heldout = [line["loss"] for line in history if line["split"] == "heldout"]
    assert heldout[-1] < heldout[0]
    said = capsys.readouterr().out
    assert "step 4: 1 update(s) left out, as loss or gradient was not finite or too high" in said
    assert "2 updates left out in a row: back to step 10, on with other batches" in said
    assert said.splitlines()[-1].startswith("20 steps, ")
    assert f"best held-out loss {min(heldout):.4f} at step" in said
    line = metrics.read(tmp_path / "run")[-2]
    assert line["mfu"] == pytest.approx(line["model_tflops_per_second"] / (0.5 * jax.device_count()))
    assert line["step_seconds_p50"] <= line["step_seconds_p90"] <= line["step_seconds_p99"]
    assert 0 <= line["data_wait"] <= 1 and 0 < line["goodput"] <= 1


def test_a_run_that_stays_astray_is_given_up(run, tmp_path, monkeypatch):
    prefetch = loader.Batches.prefetch

    def poisoned(self, start, stop, depth):
        for index, batch in enumerate(prefetch(self, start, stop, depth), start):
            yield batch | {"loss_weights": batch["loss_weights"] * np.float32(1 if index < 6 else np.nan)}

    monkeypatch.setattr(loader.Batches, "prefetch", poisoned)
    with pytest.raises(InputError, match=r"^updates are left out after 3 roll-backs to step 5 too; lower "):
        run(tmp_path / "run", "llama", {"train.roll_back_after": 2})


def test_a_trace_of_some_steps(run, tmp_path):
    run(tmp_path / "run", "llama", {"train.steps": 5}, "--profile=2:2")
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


def test_a_lost_folder_comes_back_from_the_mirror(run, tmp_path):
    overrides = {"train.mirror": str(tmp_path / "mirror"), "train.steps": 10}
    whole = run(tmp_path / "run", "llama", overrides)
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "mirror" / "10")
    assert run(tmp_path / "run", "llama", overrides) == whole
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model
    with pytest.raises(InputError, match=r"^train\.mirror .* holds a run with train\.seed=0, this one has 1; "):
        run(tmp_path / "other", "llama", overrides | {"train.seed": 1})
    assert not (tmp_path / "other").exists()
