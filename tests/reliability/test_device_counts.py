"""A run that goes on with another number of devices at each restart ends as one on a single device.

Run by itself, this file is eight devices that train in turns: `python tests/reliability/test_device_counts.py CONFIG
FOLDER TURN …`, a turn being DEVICES:STEPS:SECTION.KEY=VALUE,….
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import jax
import pytest

from gqa import models
from gqa.sharding import make_mesh
from gqa.training import config as run_config
from gqa.training import loop, metrics

FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
OVERRIDES = {"train.log_every": 1, "train.eval_every": 100, "optimizer.learning_rate": 0.1}
SMALL = {"llama": {"model.changes.num_layers": 1}, "t5": {}}


@pytest.mark.parametrize(
    ("family", "turns"),
    [
        ("llama", [(8, 2, "fsdp=4,tensor=2"), (4, 4, "data=2,tensor=2"), (1, 6, ""), (8, 8, "fsdp=4,tensor=2")]),
        pytest.param(
            "t5",
            [(8, 3, "slice=2,fsdp=4"), (4, 6, "tensor=4"), (1, 9, ""), (8, 12, "data=2,sequence=2,tensor=2")],
            marks=pytest.mark.full,
        ),
    ],
)
def test_devices_come_and_go(run_python, tiny_config, tmp_path, family, turns):
    config = json.dumps(tiny_config(family, OVERRIDES | SMALL[family]))
    one_device = [(1, turns[-1][1], "")]
    batches, losses = [], []
    for name, these in (("changing", turns), ("one", one_device)):
        words = [f"{devices}:{steps}:{mesh}" for devices, steps, mesh in these]
        process = run_python(__file__, config, tmp_path / name, *words, XLA_FLAGS=FLAGS)
        assert process.returncode == 0, process.stderr
        batches.append(json.loads(process.stdout.splitlines()[-1]))
        losses.append([line["loss"] for line in metrics.read(tmp_path / name) if line["split"] == "train"])
    assert batches[0] == batches[1] and len(set(batches[0])) == len(batches[0]) == turns[-1][1]
    assert len(losses[1]) == turns[-1][1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def main() -> None:
    config, folder, *turns = sys.argv[1:]
    raw, read = json.loads(config), []
    place = loop.place_batch

    def observed(mesh, batch):
        if not observed.scoring:
            read.append(hashlib.sha256(batch["targets"].tobytes()).hexdigest())
        return place(mesh, batch)

    score = loop.heldout_metrics

    def scored(*arguments, **options):
        observed.scoring = True
        result = score(*arguments, **options)
        observed.scoring = False
        return result

    observed.scoring = False
    loop.place_batch, loop.heldout_metrics = observed, scored
    for turn in turns:
        devices, steps, words = turn.split(":")
        sizes = dict(data=1, fsdp=1, tensor=1)
        sizes |= {name: int(size) for name, _, size in (word.partition("=") for word in words.split(",") if word)}
        run = run_config.parse(raw | {"mesh": sizes, "train": raw["train"] | {"steps": int(steps)}})
        run.check_devices(int(devices))
        architecture = run.model.architecture()
        loop.train(
            run,
            Path(folder),
            mesh=make_mesh(run.mesh, jax.devices()[: int(devices)]),
            architecture=architecture,
            initial_model=lambda architecture=architecture: models.create(architecture, jax.random.key(0)),
            token_ids=None,
            records=Path(run.records),
            export=lambda model, path: path.mkdir(parents=True),
        )
    print(json.dumps(read))


if __name__ == "__main__":
    main()
