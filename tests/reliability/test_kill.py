"""A run that is killed or told to stop, and started again, ends as one that never was, bit for bit.

Run by itself, this file is `gqa.train` that gets a signal at an exact moment:
`python tests/reliability/test_kill.py MOMENT NUMBER SIGNAL --config=FILE --workdir=DIR`.
"""

import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gqa import command_line, models, sharding, train
from gqa.checkpoints.store import Store
from gqa.data import loader
from gqa.training import loop, metrics
from gqa.training import optimizer as optimizers
from gqa.training.state import abstract_state
from gqa.training.watch import RATES

STEPS = 20
# With dropout and micro-batches, whose random keys have to come out the same; checkpoints at 5, 10, 15 and 20.
OVERRIDES = {"train.steps": STEPS, "model.dropout_rate": 0.1, "train.accumulation": 2, "records": None}
NEVER = ("never", 1, "SIGKILL")


def cache_of(workdir: Path) -> Path:
    return workdir.with_suffix(".cache")


def batches_of(workdir: Path) -> Path:
    """File of the batches that a run took, a line each, those of its lost steps too: index and digest."""
    return workdir.with_suffix(".batches")


@pytest.fixture(scope="module")
def start(config_file, run_python):
    """A function (workdir, moment, number, signal) -> the finished process; each workdir prepares its own records."""
    path = config_file("t5", OVERRIDES)

    def run(workdir: Path, moment: str, number: int, signal_name: str):
        arguments = (moment, number, signal_name, f"--config={path}", f"--workdir={workdir}")
        return run_python(__file__, *arguments, GQA_CACHE=str(cache_of(workdir)))

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
        batches = [set(batches_of(folder).read_text().splitlines()) for folder in (workdir, expected)]
        assert batches[0] == batches[1] and len(batches[1]) == STEPS
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
    assert moments["metrics"] == 23 and moments["commit"] == moments["sums"] == 4 and moments["prepare"] > 2
    assert sorted(os.listdir(workdir / "checkpoints")) == ["15", "20"]
    assert sorted(os.listdir(workdir)) == [
        "architecture.json",
        "checkpoints",
        "config.json",
        "finished.json",
        "lock",
        "metrics.jsonl",
        "model",
        "tensorboard",
    ]


def test_killed_in_each_phase(start, assert_same_end, tmp_path):
    """While records are prepared, before the first checkpoint, as sums are written and as all is there but the name of
    the second, and a few steps later."""
    rng = random.Random(0)
    workdir = tmp_path / "run"
    kills = [("prepare", 5), ("metrics", rng.randint(2, 5)), ("sums", 2), ("commit", 1), ("metrics", rng.randint(2, 9))]
    left = []
    for moment, number in kills:
        process = start(workdir, moment, number, "SIGKILL")
        assert process.returncode == -signal.SIGKILL, process.stderr
        folder = workdir / "checkpoints"
        left.append(sorted(os.listdir(folder)) if folder.exists() else None)
    assert left[:4] == [None, [], ["10.unfinished", "5"], ["10.unfinished", "5"]]
    process = start(workdir, *NEVER)
    assert process.returncode == 0, process.stderr
    assert_same_end(workdir)


# In a mount namespace of its own: a run on a tmpfs with room for a checkpoint and a half, killed; room, and on it goes.
ON_A_TMPFS = """
set -e
workdir=$1 size=$2 python=$3 test=$4
shift 4
mkdir "$workdir"
mount -t tmpfs -o size=$((size * 3 / 2)) none "$workdir"
code=0
"$python" "$test" metrics 19 SIGKILL "$@" || code=$?
echo "code $code; checkpoints: $(ls "$workdir/checkpoints" | tr '\\n' ' ')"
mount -o remount,size=$((size * 9)) "$workdir"
"$python" "$test" never 1 SIGKILL "$@"
cp -r "$workdir" "$workdir.kept"
umount "$workdir"
rmdir "$workdir"
mv "$workdir.kept" "$workdir"
"""


def test_a_disk_fills_up(uninterrupted, assert_same_end, config_file, run_python, tmp_path):
    """The run goes on without checkpoints 10 and 15, and is killed at step 17; with room again it loses nothing."""
    workdir, probe = tmp_path / "run", ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here; tests/checkpoints/test_store.py has a limit on the size of files")
    size = sum(path.stat().st_blocks * 512 for path in (uninterrupted[0] / "checkpoints" / "20").rglob("*"))
    command = ["unshare", "-rm", "sh", "-c", ON_A_TMPFS, "sh", workdir, size, sys.executable, __file__]
    command += [f"--config={config_file('t5', OVERRIDES)}", f"--workdir={workdir}"]
    replace_by = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    process = run_python("-c", replace_by, *command, GQA_CACHE=str(cache_of(workdir)))
    assert process.returncode == 0, process.stderr
    (checkpoints,) = re.findall(r"code 137; checkpoints: (.*)", process.stdout)
    assert checkpoints.split()[-1] == "5" and set(checkpoints.split()) <= {"5", "15.unfinished"}
    warnings = [line for line in process.stderr.splitlines() if "could not be saved" in line]
    assert warnings[0] == (
        "warning: checkpoint of step 10 could not be saved: No space left on device; the run goes on, older ones stay"
    )
    assert_same_end(workdir)


@pytest.mark.full
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
def test_killed_fifty_times_anywhere(start, uninterrupted, assert_same_end, tmp_path):
    """At any write of metrics and any use of a file, of records or of the run, in as many runs as it takes.

    Three times in four soon after the start, so that a run takes many kills.
    """
    rng = random.Random(1)
    total = sum(uninterrupted[1].values())
    kills = runs = 0
    while kills < 50:
        runs += 1
        workdir = tmp_path / str(runs)
        process = None
        while process is None or process.returncode == -signal.SIGKILL:
            process = start(workdir, "any", rng.randint(1, rng.choice([total, *3 * [total // 3]])), "SIGKILL")
            kills += process.returncode == -signal.SIGKILL
        assert process.returncode == 0, process.stderr
        assert_same_end(workdir)


def main() -> None:
    moment, number, signal_name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.argv[1:4] = []
    workdir = Path(sys.argv[-1].partition("=")[2])
    counts = collections.Counter()

    def happens(name: str) -> None:
        counts[name] += 1
        reached = counts.total() if moment == "any" else counts[moment]
        if moment in ("any", name) and reached == number:
            os.kill(os.getpid(), signal.Signals[signal_name])

    def moment_of(event: str, path: Path, flags: int) -> str:
        if path.is_relative_to(cache_of(workdir)):
            return "prepare"
        if path.name == "SHA256SUMS" and path.parent.suffix == ".unfinished" and flags & os.O_WRONLY:
            return "sums"
        # The rename that makes a checkpoint appear.
        return "commit" if event == "os.rename" and path.suffix == ".unfinished" else event

    def audit(event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and isinstance(arguments[0], str | Path):
            path = Path(arguments[0])
            if path.is_relative_to(workdir) or path.is_relative_to(cache_of(workdir)):
                happens(moment_of(event, path, arguments[2] if event == "open" else 0))

    prefetch = loader.Batches.prefetch

    def noted(self, start, stop, depth):
        with batches_of(workdir).open("a") as file:
            for index, batch in enumerate(prefetch(self, start, stop, depth), start):
                digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
                file.write(f"{index} {digest}\n")
                file.flush()
                yield batch

    loader.Batches.prefetch = noted

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
