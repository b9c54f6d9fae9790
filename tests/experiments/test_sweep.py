"""A sweep survives its failures and a kill, and its table says what its runs are."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gqa import models
from gqa.checkpoints import hf

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
    content = dict(teachers=teachers, runs=runs, calibration={}, overrides=(), keep_checkpoints=False)
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
