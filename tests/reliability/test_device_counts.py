"""A run that is killed and goes on with another number of devices each time ends as one on a single device.

Run by itself, this file is a run on the first of eight devices, killed a few uses of a file after its first checkpoint:
`python tests/reliability/test_device_counts.py CONFIG FOLDER DEVICES SECTION.KEY=VALUE,… USES`; 0 uses: never.
"""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import jax
import pytest

from gqa import models
from gqa.data import loader
from gqa.sharding import make_mesh
from gqa.training import config as run_config
from gqa.training import loop, metrics

FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
STEPS = 10
OVERRIDES = {"train.steps": STEPS, "train.save_every": 2, "train.log_every": 1, "train.eval_every": 100}
OVERRIDES |= {"optimizer.learning_rate": 0.1}
SMALL = {"llama": {"model.changes.num_layers": 1}, "t5": {}}


@pytest.mark.parametrize(
    ("family", "meshes"),
    [
        ("llama", [(8, "fsdp=4,tensor=2"), (4, "data=2,tensor=2"), (1, ""), (8, "fsdp=4,tensor=2")]),
        pytest.param(
            "t5",
            [(8, "slice=2,fsdp=4"), (4, "tensor=4"), (1, ""), (8, "data=2,sequence=2,tensor=2")],
            marks=pytest.mark.full,
        ),
    ],
)
def test_killed_as_devices_come_and_go(run_python, tiny_config, tmp_path, family, meshes):
    config, rng = json.dumps(tiny_config(family, OVERRIDES | SMALL[family])), random.Random(0)

    def start(name: str, devices: int, mesh: str, uses: int) -> list[tuple[int, str]]:
        """The batches that the process took: number and digest."""
        process = run_python(__file__, config, tmp_path / name, devices, mesh, uses, XLA_FLAGS=FLAGS)
        assert process.returncode == (-signal.SIGKILL if uses else 0), process.stderr
        lines = [line.split() for line in process.stdout.splitlines() if line.startswith("batch ")]
        return [(int(number), digest) for _, number, digest in lines]

    def losses(name: str) -> list[float]:
        return [line["loss"] for line in metrics.read(tmp_path / name) if line["split"] == "train"]

    uses = [rng.randint(2, 12) for _ in meshes[:-1]] + [0]
    taken = [start("changing", *mesh, number) for mesh, number in zip(meshes, uses, strict=True)]
    expected = start("one", 1, "", 0)
    assert [number for number, _ in expected] == list(range(STEPS)) and len({digest for _, digest in expected}) == STEPS
    # Steps that a kill lost are taken again, with the same batches.
    assert {batch for batches in taken for batch in batches} == set(expected)
    assert [taken[0][0][0], taken[-1][-1][0]] == [0, STEPS - 1] and all(batches[0][0] > 0 for batches in taken[1:])
    assert len(losses("one")) == STEPS
    assert losses("changing") == pytest.approx(losses("one"), rel=1e-5)


def main() -> None:
    config, folder, devices, mesh, uses = sys.argv[1:]
    left = int(uses)
    saved = False

    def audit(event: str, arguments: tuple) -> None:
        nonlocal saved, left
        if event not in ("open", "os.mkdir", "os.rename", "os.remove") or not isinstance(arguments[0], str | Path):
            return
        path = Path(arguments[0])
        if not path.is_relative_to(folder):
            return
        left -= saved
        if saved and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        saved = saved or (event == "os.rename" and path.suffix == ".unfinished")

    prefetch = loader.Batches.prefetch

    def noted(self, start, stop, depth):
        for number, batch in enumerate(prefetch(self, start, stop, depth), start):
            print("batch", number, hashlib.sha256(batch["targets"].tobytes()).hexdigest(), flush=True)
            yield batch

    loader.Batches.prefetch = noted
    sizes = dict(data=1, fsdp=1, tensor=1)
    sizes |= {name: int(size) for name, _, size in (word.partition("=") for word in mesh.split(",") if word)}
    run = run_config.parse(json.loads(config) | {"mesh": sizes})
    run.check_devices(int(devices))
    architecture = run.model.architecture()
    if left:
        sys.addaudithook(audit)
    loop.train(
        run,
        Path(folder),
        mesh=make_mesh(run.mesh, jax.devices()[: int(devices)]),
        architecture=architecture,
        initial_model=lambda: lambda: models.create(architecture, jax.random.key(0)),
        token_ids=None,
        records=Path(run.records),
        export=lambda model, path: path.mkdir(parents=True),
    )


if __name__ == "__main__":
    main()
