"""A sweep survives its failures and a kill, and its table says what its runs are."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import sweep
from gqa import models
from gqa.checkpoints import hf
from gqa.command_line import load_config
from gqa.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep_file(tmp_path, random_model, config_file):
    """A sweep of the teacher, two good conversions and one that cannot be, whose heads do not divide the 8."""
    teacher = tmp_path / "teacher"
    heads = dict(num_heads=8, encoder_self_kv_heads=8, decoder_self_kv_heads=8, cross_kv_heads=8)
    config = dataclasses.replace(models.size("t5_1_1_mini"), d_model=32, head_dim=4, d_ff=64, **heads)
    hf.save(random_model(config), teacher, dtype="float32")
    changes = {"model.size": None, "model.changes": {}, "train.steps": None, "train.save_every": 2}
    uptrain = config_file("t5", changes | {"uptrain": dict(original_steps=10, alpha=1.0), "train.eval_every": 100})
    path = tmp_path / "sweep.py"
    teachers = dict(tiny=dict(checkpoint=str(teacher), uptrain=str(uptrain), kv_heads=8))
    runs = dict(method=("mean",), kv_heads=(8, 3, 2), alpha=(0.0, 1.0), seed=(1, 2))
    content = dict(teachers=teachers, runs=runs, calibration={}, overrides=(), finetune={}, keep_checkpoints=False)
    path.write_text(f"from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict({content!r})\n")
    return path


@pytest.mark.full
def test_killed_and_started_again(sweep_file, run_python, tmp_path):
    arguments = ("-m", "experiments.sweep", f"--config={sweep_file}")
    workdir = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *arguments, f"--workdir={workdir}"], cwd=ROOT, env=os.environ)
    while not (workdir / "tiny-none-k8-a1-s1" / "uptrained" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()

    tables = []
    for folder in (workdir, tmp_path / "undisturbed"):
        finished = run_python(*arguments, f"--workdir={folder}")
        assert finished.returncode == 1, finished.stderr
        assert "does not divide" in finished.stdout and "6 done, 3 failed, 0 waiting" in finished.stdout
        kept = {path.parent.name for path in folder.glob("*/metrics.jsonl")}
        assert kept == {f"tiny-{run}-a1-s{seed}" for run in ("none-k8", "mean-k2") for seed in (1, 2)}
        with (folder / "results.csv").open() as file:
            tables.append([row | {"seconds": None} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert len(tables[0]) == 6 and len({row["loss"] for row in tables[0]}) == 6


def test_lists_and_writes_an_array(sweep_file, run_python, tmp_path):
    arguments = ("-m", "experiments.sweep", f"--config={sweep_file}", f"--workdir={tmp_path / 'runs'}")
    listed = run_python(*arguments, "--list")
    assert listed.returncode == 0 and "0 done, 0 failed, 9 waiting" in listed.stdout
    assert run_python(*arguments, "--array=4").returncode == 0
    script = (tmp_path / "runs" / "array.sh").read_text()
    assert "#SBATCH --array=0-3\n" in script and '--worker="$SLURM_ARRAY_TASK_ID/4"' in script
    assert subprocess.run(["bash", "-n", tmp_path / "runs" / "array.sh"]).returncode == 0
    refused = run_python(*arguments, "--worker=4/4")
    assert refused.returncode == 2 and "--worker=4/4; expected I/N" in refused.stderr


def test_takes_over_known_runs(sweep_file, run_python, tmp_path):
    runs = [("mean", 2, 1.25), ("none", 8, 1.0), ("first", 2, 3.0)]  # the last is none of the sweep's
    rows = [
        dict(teacher="tiny", method=method, kv_heads=kv_heads, alpha=1.0, seed=1, loss=loss, accuracy=0.5, seconds=1.0)
        | dict(target_tokens=99.0, commands=["python -m gqa.train"])
        for method, kv_heads, loss in runs
    ]
    known, workdir = tmp_path / "results.json", tmp_path / "runs"
    known.write_text(json.dumps({"runs": rows}))
    arguments = ("-m", "experiments.sweep", f"--config={sweep_file}", f"--workdir={workdir}", "--list")
    listed = run_python(*arguments, f"--known={known}")
    assert listed.returncode == 0 and "2 done, 0 failed, 7 waiting" in listed.stdout
    assert json.loads((workdir / "results.json").read_text())["runs"] == [rows[1], rows[0]]
    for content, reason in (('{"runs": [{}]}', "is no results.json of a sweep"), ("{", "is not readable JSON")):
        known.write_text(content)
        refused = run_python(*arguments, f"--known={known}")
        assert refused.returncode == 2 and reason in refused.stderr and refused.stderr.count("\n") == 1


def test_processes_that_end_together_write_whole_tables(sweep_file, tmp_path):
    config = load_config(sweep_file)
    runs = sweep.Sweep(config, tmp_path).runs
    for run in runs:
        folder = tmp_path / run.name
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(run._asdict() | dict(loss=1.5, accuracy=0.5, target_tokens=7)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: sweep.Sweep(config, tmp_path).collect(), range(40))) == [[]] * 40
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == len(runs)
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(runs)
    assert sorted(path.name for path in tmp_path.glob("*results*")) == ["results.csv", "results.json"]


def test_fine_tunes_and_scores(sweep_file, tmp_path, monkeypatch):
    finetuning = tmp_path / "finetune.py"
    finetuning.write_text(
        "from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict(dict(data=dict(source='texts')))\n"
    )
    config = load_config(sweep_file)
    choice = dict(config=str(finetuning), rows=9, inputs_length=256, max_new_tokens=64, metrics="rouge")
    config.runs.update(kv_heads=(2,), alpha=(1.0,), seed=(3,))
    config.finetune = ConfigDict({"docstring": choice})
    called = []

    def call(module, arguments, log, lock):
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        called.append((module, options))
        output = Path(options.get("output") or options["workdir"])
        if module == "gqa.train":
            output.mkdir()
            (output / "finished.json").touch()
        elif module == "checkpoints_tools.convert":
            output.mkdir()
        elif "task_file" in options:
            output.mkdir()
            scores = {"docstring": {"rouge1": {"value": 21.5, "low": 20.0, "high": 23.0}}}
            (output / "scores.json").write_text(json.dumps({"checkpoints": {"model": {"scores": scores}}}))
        elif module == "gqa.evaluate":
            output.write_text(json.dumps(dict(loss=2.0, accuracy=0.5, target_tokens=7)))
        else:
            output.touch()
        return 0

    monkeypatch.setattr(sweep, "_call", call)
    workdir = tmp_path / "runs"
    workdir.mkdir()
    runs = sweep.Sweep(config, workdir)
    runs.do(runs.runs)
    assert runs.collect() == []
    modules = ["checkpoints_tools.convert", "gqa.train", "gqa.evaluate", "gqa.train", "gqa.data.tasks", "gqa.evaluate"]
    assert [module for module, _ in called] == modules
    folder = workdir / "tiny-mean-k2-a1-s3"
    tuning, rows, scoring = (options for _, options in called[3:])
    assert (
        tuning["config.model.checkpoint"] == str(folder / "uptrained" / "model") and tuning["config.train.seed"] == "3"
    )
    assert rows == dict(task="docstring", source="texts", limit="9", output=str(folder / "docstring.jsonl"))
    assert scoring["checkpoint"] == str(folder / "docstring" / "model") and scoring["task_file"] == rows["output"]
    with (workdir / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["docstring rouge1"], row["loss"], row["target_tokens"]) == ("21.5", "2.0", "7")
    assert not (folder / "docstring").exists() and (folder / "docstring-scores").exists()


@pytest.mark.parametrize("config", ["teacher_t5.py", "teacher_llama.py"])
def test_from_scratch_at_equal_parameters(config, tmp_path):
    pretrain = ROOT / "configs" / config
    content = dict(
        teachers=dict(ours=dict(pretrain=str(pretrain), kv_heads=8)),
        runs=dict(method=("scratch",), kv_heads=(8, 2, 1), alpha=(0.0, 0.05), seed=(1, 2)),
        overrides=("--config.train.eval_every=10",),
    )
    runs = sweep.Sweep(ConfigDict(content), tmp_path)
    assert [run.name for run in runs.runs] == [f"ours-scratch-k{k}-a1-s{seed}" for seed in (1, 2) for k in (8, 2, 1)]
    model = load_config(pretrain).model
    whole = dataclasses.replace(models.size(model.size), **model.changes)
    for run in runs.runs:
        (train, arguments), (evaluate, _) = runs._commands(run, tmp_path)
        assert (train, evaluate) == ("gqa.train", "gqa.evaluate")
        assert f"--config.train.seed={run.seed}" in arguments and "--config.train.eval_every=10" in arguments
        prefix = "--config.model.changes."
        changes = dict(text.removeprefix(prefix).split("=") for text in arguments if text.startswith(prefix))
        trained = dataclasses.replace(whole, **{name: int(value) for name, value in changes.items()})
        assert trained.kv_heads("decoder_self") == (run.kv_heads,) * len(whole.kv_heads("decoder_self"))
        sizes = [models.num_parameters(models.abstract(each)) for each in (whole, trained)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_from_scratch_needs_the_config_of_the_pre_training(sweep_file, tmp_path):
    config = load_config(sweep_file)
    config.runs.method = ("scratch", "mean")
    with pytest.raises(InputError, match=r"teachers\.tiny\.pretrain: None is missing"):
        sweep.Sweep(config, tmp_path)
