"""A run that is killed or told to stop, and started again, ends as one that never was, bit for bit.

Run by itself, this file is `gqa.train` that gets a signal at an exact moment:
`python tests/reliability/test_kill.py MOMENT NUMBER SIGNAL --config=FILE --workdir=DIR`.
"""

import collections
import json
import os
import random
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gqa import command_line, models, sharding, train
from gqa.checkpoints.store import Store
from gqa.training import loop, metrics
from gqa.training import optimizer as optimizers
from gqa.training.state import abstract_state
from gqa.training.watch import RATES

STEPS = 20
# With dropout and micro-batches, whose random keys have to come out the same; checkpoints at 5, 10, 15 and 20.
OVERRIDES = {"train.steps": STEPS, "model.dropout_rate": 0.1, "train.accumulation": 2}
NEVER = ("never", 1, "SIGKILL")


@pytest.fixture(scope="module")
def start(config_file, run_python):
    """A function (workdir, moment, number, signal) -> the finished process."""
    path = config_file("t5", OVERRIDES)

    def run(workdir: Path, moment: str, number: int, signal_name: str):
        arguments = (moment, number, signal_name, f"--config={path}", f"--workdir={workdir}")
        return run_python(__file__, *arguments)

    return run


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The folder of a run that nothing disturbed, and how often each moment came."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(workdir, *NEVER)
    assert process.returncode == 0, process.stderr
    return workdir, json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def assert_same_end(uninterrupted, tiny_run):
    """A function that compares the folder of a run with that of `uninterrupted`."""
    config = tiny_run("t5", OVERRIDES)
    mesh = sharding.make_mesh(config.mesh)
    model = models.abstract(config.model.architecture())
    optimizer = optimizers.optimizer(config.optimizer, config.schedule_offset, sharding.logical_axes(model))
    like = abstract_state(model, optimizer, mesh)

    def last_state(workdir: Path):
        with Store(workdir / "checkpoints", config.train.keep) as store:
            assert store.latest_step() == STEPS
            return store.restore(STEPS, like)

    def history(workdir: Path):
        return [{name: value for name, value in line.items() if name not in RATES} for line in metrics.read(workdir)]

    def names(workdir: Path):
        return sorted(
            path.relative_to(workdir).as_posix() for path in workdir.rglob("*") if "tfevents" not in path.name
        )

    def compare(workdir: Path):
        expected = uninterrupted[0]
        for name in ("model.safetensors", "config.json", "characters.model"):
            assert (workdir / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()
        assert history(workdir) == history(expected)
        found, wanted = (jax.tree_util.tree_leaves_with_path(last_state(folder)) for folder in (workdir, expected))
        assert len(found) == len(wanted) > 20
        for (path, leaf), (_, other) in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))
        for folder in ("", "checkpoints"):  # nothing is left lying about
            assert sorted(os.listdir(workdir / folder)) == sorted(os.listdir(expected / folder))

    return compare


def test_the_uninterrupted_run(uninterrupted):
    workdir, moments = uninterrupted
    lines = [(line["split"], line["step"]) for line in metrics.read(workdir)]
    heldout = [("heldout", 0), ("heldout", 10), ("heldout", 20)]
    assert sorted(lines) == sorted(heldout + [("train", step) for step in range(1, STEPS + 1)])
    assert moments["metrics"] == 23 and moments["commit"] == 4
    assert sorted(os.listdir(workdir / "checkpoints")) == ["15", "20"]
    assert sorted(os.listdir(workdir)) == [
        "architecture.json",
        "checkpoints",
        "config.json",
        "finished.json",
        "metrics.jsonl",
        "model",
        "tensorboard",
    ]


def test_killed_at_a_step_and_during_a_save(start, assert_same_end, tmp_path):
    """Killed before the first checkpoint, when the second is written and has no name yet, and a few steps later."""
    rng = random.Random(0)
    workdir = tmp_path / "run"
    kills = [("metrics", rng.randint(2, 5)), ("commit", 2), ("metrics", rng.randint(2, 12))]
    checkpoints = []
    for moment, number in kills:
        process = start(workdir, moment, number, "SIGKILL")
        assert process.returncode == -signal.SIGKILL, process.stderr
        checkpoints.append(sorted(os.listdir(workdir / "checkpoints")))
    assert checkpoints[0] == [] and checkpoints[1] == ["10.orbax-checkpoint-tmp", "5"]
    process = start(workdir, *NEVER)
    assert process.returncode == 0, process.stderr
    assert_same_end(workdir)


def test_told_to_stop(start, assert_same_end, tmp_path):
    """Write 8 of the history is step 7's; the resumed run's are 8, 9, 10, 10 (held-out), 11, 12, …"""
    workdir = tmp_path / "run"
    for number, signal_name, step in ((8, "SIGINT", 7), (6, "SIGTERM", 12)):
        process = start(workdir, "metrics", number, signal_name)
        assert process.returncode == 130
        last_line = process.stderr.splitlines()[-1]
        assert last_line == f"{signal_name} at step {step}: saved; the same command goes on from there"
        assert max(map(int, os.listdir(workdir / "checkpoints"))) == step
        assert not (workdir / "model").exists()
    process = start(workdir, *NEVER)
    assert process.returncode == 0, process.stderr
    assert_same_end(workdir)


@pytest.mark.full
def test_killed_twenty_times_anywhere(start, uninterrupted, assert_same_end, tmp_path):
    """At any write of metrics and any use of a file in the folder, in as many runs as it takes."""
    rng = random.Random(1)
    total = sum(uninterrupted[1].values())
    kills = runs = 0
    while kills < 20:
        runs += 1
        workdir = tmp_path / str(runs)
        while (process := start(workdir, "any", rng.randint(1, total), "SIGKILL")).returncode == -signal.SIGKILL:
            kills += 1
        assert process.returncode == 0, process.stderr
        assert_same_end(workdir)


def main() -> None:
    moment, number, signal_name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.argv[1:4] = []
    workdir = sys.argv[-1].partition("=")[2]
    counts = collections.Counter()

    def happens(name: str) -> None:
        counts[name] += 1
        reached = counts.total() if moment == "any" else counts[moment]
        if moment in ("any", name) and reached == number:
            os.kill(os.getpid(), signal.Signals[signal_name])

    def audit(event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and isinstance(arguments[0], str | Path):
            path = Path(arguments[0])
            if path.is_relative_to(workdir):
                # The rename that makes a checkpoint appear.
                is_commit = event == "os.rename" and path.parent.name == "checkpoints"
                happens("commit" if is_commit else event)

    class Writer(metrics.MetricsWriter):
        def write(self, step, split, values):
            happens("metrics")
            super().write(step, split, values)

    loop.MetricsWriter = Writer
    sys.addaudithook(audit)
    try:
        command_line.run(train.main)
    finally:
        print(json.dumps(counts))


if __name__ == "__main__":
    main()
