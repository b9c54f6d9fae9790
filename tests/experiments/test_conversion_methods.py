"""Every method once on a tiny teacher: cells, what is known already, and shares of one uptraining."""

import dataclasses
import json
import subprocess
import types
import warnings
from pathlib import Path

import pytest

from experiments import conversion_methods
from experiments.conversion_report import report
from gqa import models
from gqa.checkpoints import hf
from gqa.errors import InputError

SITES = ("decoder_self", "cross")
TOGETHER = "decoder_self+cross"
METHODS = ("mean", "svd+group+refit")


@pytest.fixture
def command(tmp_path, random_model, config_file, monkeypatch):
    """A function (options) -> results.json of the command on a random T5 of 8 heads."""
    teacher = tmp_path / "teacher"
    heads = dict(num_heads=8, encoder_self_kv_heads=8, decoder_self_kv_heads=8, cross_kv_heads=8)
    config = dataclasses.replace(models.size("t5_1_1_mini"), d_model=32, head_dim=4, d_ff=64, **heads)
    hf.save(random_model(config), teacher, dtype="float32")
    changes = {"model.size": None, "model.changes": {}, "train.steps": None, "train.save_every": 2}
    uptrain = config_file("t5", changes | {"uptrain": dict(original_steps=4, alpha=1.0)})
    small = dict(
        TEACHERS={"t5": (teacher, Path(uptrain), SITES)},
        METHODS=METHODS,
        APART=("mean",),
        UPTRAINED=("mean",),
        RATES=(0.1, 1.0),
        CALIBRATION_ROWS=8,
        BATCH=4,
    )
    for name, value in small.items():
        monkeypatch.setattr(conversion_methods, name, value)

    def call(*options: str) -> dict:
        arguments = ["--teacher=t5", "--rows=8", f"--results={tmp_path / 'results'}", *options]
        monkeypatch.setattr("sys.argv", ["conversion_methods", *arguments])
        conversion_methods.main()
        return json.loads((tmp_path / "results" / "t5.json").read_text())

    return call


def cells(results: dict) -> set[tuple]:
    return {tuple(run[name] for name in conversion_methods.Run._fields) for run in results["runs"]}


def test_without_uptraining(command, tmp_path, monkeypatch, capsys):
    results = command("--alphas=0", "--seeds=2", f"--workdir={tmp_path / 'runs'}")
    assert cells(results) == {
        (TOGETHER, "teacher", 8, 0.0, 0, 0.0),
        *((sites, "mean", K, 0.0, 0, 0.0) for sites in (TOGETHER, *SITES) for K in (4, 2, 1)),
        *((TOGETHER, "svd+group+refit", K, 0.0, seed, 0.0) for K in (4, 2, 1) for seed in (0, 1)),
    }
    teacher = results["teacher"]
    assert set(teacher["cost_without"]) == set(SITES) and teacher["rows"] == 8
    (own,) = [run for run in results["runs"] if run["method"] == "teacher"]
    assert own["loss"] == teacher["heldout"]["loss"] != own["tuning_loss"]
    assert "gap closed" in capsys.readouterr().out

    # In another folder, what the results hold is not done again.
    monkeypatch.setattr(conversion_methods.Bench, "_converted", lambda self, run: pytest.fail(f"{run} is done again"))
    again = command("--alphas=0", "--seeds=2", f"--workdir={tmp_path / 'other'}")
    assert again["runs"] == results["runs"]
    assert all(run["cpu"] and run["commit"] for run in results["runs"])

    # What this command does not run stays; of other rows or another teacher nothing is written over.
    path = tmp_path / "results" / "t5.json"
    uptrained = results["runs"][1] | {"alpha": 0.05, "rate": 3.0}
    path.write_text(json.dumps(results | {"runs": [*results["runs"], uptrained], "tuning": {"mean": {"3": 1.0}}}))
    kept = command("--alphas=0", "--methods=mean", "--seeds=1", f"--workdir={tmp_path / 'other'}")
    assert kept["runs"][-1] == uptrained and kept["tuning"] == {"mean": {"3": 1.0}}
    assert cells(kept) == cells(results) | cells({"runs": [uptrained]})
    before = path.read_text()
    with pytest.raises(
        InputError, match=r"--rows=16: .*t5\.json holds runs on 8 rows; expected as many, or --results="
    ):
        command("--alphas=0", "--rows=16", f"--workdir={tmp_path / 'other'}")
    of_another = json.loads(before)
    of_another["teacher"]["heldout"]["loss"] += 1
    path.write_text(json.dumps(of_another))
    with pytest.raises(
        InputError, match=r"t5\.json is of another teacher or of other text: its loss is .*--results=DIR"
    ):
        command("--alphas=0", f"--workdir={tmp_path / 'other'}")
    assert json.loads(path.read_text()) == of_another


@pytest.mark.full
def test_uptraining(command, tmp_path):
    choices = ("--methods=mean", "--uptrained=mean,svd+group+refit")
    results = command("--alphas=0,0.5,1", "--seeds=1", *choices, f"--workdir={tmp_path / 'runs'}")
    uptrained = {cell for cell in cells(results) if cell[3] > 0}
    assert {cell[1:4] for cell in uptrained} == {
        (method, K, alpha)
        for alpha in (0.5, 1.0)
        for method, heads in (("teacher", (8,)), ("mean", (4, 2, 1)), ("svd+group+refit", (4, 2, 1)))
        for K in heads
    }
    rates = {method: {cell[5] for cell in uptrained if cell[1] == method} for method in ("teacher", *METHODS)}
    assert all(len(tried) == 1 for tried in rates.values())  # the best of a method, for all of its cells
    for method, tried in results["tuning"].items():
        assert tried.keys() == {"0.1", "1"} and {float(min(tried, key=tried.get))} == rates[method]
    assert len({run["loss"] for run in results["runs"] if run["alpha"]}) == len(uptrained)
    assert not list((tmp_path / "runs").rglob("converted"))


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ({1.0: 3, 3.0: 4, 0.3: 5}, 1.0, {1.0, 3.0, 0.3}),
        ({1.0: 5, 3.0: 4, 10.0: 3, 30.0: 3.5}, 10.0, {1.0, 3.0, 10.0, 30.0}),
        ({1.0: 5, 3.0: 4, 10.0: 3, 30.0: 2}, 30.0, {1.0, 3.0, 10.0, 30.0}),
        ({1.0: 5, 3.0: 6, 0.3: 4, 0.1: 4.5}, 0.3, {1.0, 3.0, 0.3, 0.1}),
    ],
)
def test_rates_are_tried_until_the_next_is_worse(losses, best, tried, monkeypatch):
    bench = conversion_methods.Bench.__new__(conversion_methods.Bench)
    bench.tuning, bench._tried = {}, (0.01, {"mean": {"1": 0.0}})  # of another share: not asked
    monkeypatch.setattr(conversion_methods.Bench, "once", lambda self, run: {"tuning_loss": losses[run.rate]})
    run = conversion_methods.Run(TOGETHER, "mean", 2, 0.05, 0, 1.0)
    assert bench._best_rate(run) == best
    assert bench.tuning == {"mean": {f"{rate:g}": losses[rate] for rate in tried}}

    # What earlier results say was tried is not run again.
    bench._tried = (0.05, bench.tuning)
    bench.tuning = {}
    monkeypatch.setattr(conversion_methods.Bench, "once", lambda self, run: pytest.fail(f"{run} is done again"))
    assert bench._best_rate(run) == best
    assert bench.tuning == bench._tried[1]

    # The search begins at the best of them, not at 1.
    bench._tried = (0.05, {"mean": {f"{best:g}": losses[best]}})
    monkeypatch.setattr(conversion_methods.Bench, "once", lambda self, run: {"tuning_loss": 9})
    assert bench._best_rate(run) == best


@pytest.mark.parametrize(
    ("alphas", "share"),
    [({0.0, 0.01, 0.05}, 0.05), ({0.01, 0.05, 0.1}, 0.05), ({0.0, 0.01}, 0.01), ({0.1, 1.0}, 0.1), ({0.0}, 0.0)],
)
def test_rates_are_chosen_at_the_share_that_is_compared(alphas, share):
    assert conversion_methods._tuned_at(alphas) == share


def test_a_run_that_was_stopped_is_no_result(tmp_path, command, monkeypatch):
    """Told to stop, gqa.train saves its state and ends with 0."""
    run, ended = subprocess.run, types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: ended if "gqa.train" in command else run(command, **options)
    )
    monkeypatch.setattr(conversion_methods, "METHODS", ("mean",))
    monkeypatch.setattr(conversion_methods, "APART", ())
    with pytest.raises(
        InputError, match=r"^gqa\.train ended with exit code 0; started again, the runs go on from there$"
    ):
        command("--alphas=0.5", "--seeds=1", f"--workdir={tmp_path / 'runs'}")
    assert not list((tmp_path / "runs").rglob("*a0.5*.json"))


@pytest.mark.parametrize("content", [{}, {"teacher": 3}, {"teacher": {"rows": 8}, "runs": [{}], "tuning": {}}])
def test_results_of_another_program(content, command, tmp_path):
    (tmp_path / "t5.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"t5\.json is no result of experiments\.conversion_methods; expected one"):
        command("--alphas=0", "--rows=8", f"--results={tmp_path}")


def test_a_report_without_mean_pooling(tmp_path):
    run = dict(sites="cross", kv_heads=8, alpha=0.0, seed=0, rate=0.0, method="teacher", loss=2.0)
    svd = [run | dict(method="svd", kv_heads=2, seed=seed, loss=2.5) for seed in range(2)]
    description = dict(heldout=dict(target_tokens=7), cost_without={}, directions_of_99_percent={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = report(dict(command="x", teacher=description, runs=[run, *svd]), tmp_path, "t5")
    assert "| svd | 2.5000 ± 0.0000 |  |" in text


def test_a_method_that_is_named_twice_is_one(command, monkeypatch):
    named = []
    monkeypatch.setattr(conversion_methods.Bench, "all", lambda self, *methods: named.append(methods) or [])
    monkeypatch.setattr("experiments.conversion_report.report", lambda *arguments: "")
    command("--alphas=0", "--methods=mean,svd+group+refit,mean")
    assert named[0][0] == METHODS


def test_bad_input(command):
    for option, message in (
        ("--alphas=2", "'2' is no share"),
        ("--methods=mean,meen", "--methods: 'meen' is unknown; expected of mean, "),
        ("--uptrained=median", "--uptrained: 'median' is unknown; expected of mean, "),
        ("--seeds=0", "expected at least 1 and 8"),
        ("--rows=7", "expected at least 1 and 8"),  # a batch for tuning and one to report
    ):
        with pytest.raises(InputError, match=message):
            command(option)
