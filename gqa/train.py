"""python -m gqa.train --config=configs/NAME.py --workdir=DIR [--config.train.steps=1000 …]

Trains as the config says: from scratch, or on from a converted checkpoint (uptraining). Started again, it goes on from
its newest checkpoint. The final model is in DIR/model, in the layout of a Hugging Face checkpoint. On several hosts the
same command runs on each (docs/scaling.md).
"""

import argparse
import os
from pathlib import Path

from ml_collections import ConfigDict

from gqa import command_line, distributed
from gqa.errors import InputError
from gqa.training.memory import keep_freed_memory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_config_argument(parser)
    parser.add_argument(
        "--workdir", type=Path, required=True, help="folder of this run: metrics, checkpoints, final model"
    )
    parser.add_argument(
        "--profile", metavar="START:STEPS", help="write a trace of steps START, START+1, … into WORKDIR/profile"
    )
    distributed.add_arguments(parser)
    arguments, raw_config = command_line.parse(parser)
    keep_freed_memory()
    with distributed.running(arguments):
        _train(arguments, raw_config)


def _train(arguments: argparse.Namespace, raw_config: ConfigDict) -> None:
    # Imported here: --help and a mistyped config answer at once.
    import jax

    from gqa import checkpoints, models, sharding
    from gqa.checkpoints import hf, reward
    from gqa.data import prepare
    from gqa.training import config as run_config
    from gqa.training import loop, run_folder, signals
    from gqa.training.watch import Trace

    trace = None if arguments.profile is None else Trace.parse(arguments.profile)
    config = run_config.parse(raw_config)
    config.check_start()
    if trace is not None:
        trace.check(config.steps)
    if not jax.distributed.is_initialized():  # of several processes the first one locks, later
        run_folder.check_free(arguments.workdir)  # before a device or memory is asked for that a living run has
    architecture = config.model.architecture()
    config.check_devices(jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    run_config.check_heads(architecture, mesh.shape["tensor"])
    parent = _existing_parent(arguments.workdir)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"workdir {arguments.workdir}: {parent} is no folder to write in; choose another")
    if jax.process_count() > 1:
        distributed.on_primary(config.prepared_records)  # once, where hosts share a disk
    with signals.stopped_at_once():
        records = config.prepared_records()
    manifest = prepare.read_manifest(records)
    run_config.check_task(manifest, architecture)
    contents = None
    if config.model.checkpoint is not None:
        contents = checkpoints.read(config.model.checkpoint, **config.model.run_choices())
    run_config.check_vocabulary(manifest, architecture, contents.companions if contents else ())

    def initial_model():
        if config.model.checkpoint is None:
            return lambda: models.create(architecture, jax.random.key(config.train.seed))
        weights = None if config.adapter is None else config.adapter.base
        return checkpoints.load(config.model.checkpoint, mesh=mesh, weights=weights, **config.model.run_choices())

    if contents is not None:
        token_ids = contents.token_ids
    elif models.family_of(architecture) == "t5":
        token_ids = None  # T5's own
    else:
        token_ids = config.data.open_vocabulary().token_ids

    def teacher():
        if config.distillation is None:
            return None
        choices = config.model.run_choices() | {"dropout_rate": 0.0}
        return checkpoints.load(config.distillation.teacher, mesh=mesh, **choices)

    def export(model, directory):
        if config.reward is not None:
            reward.save(model, directory, token_ids=token_ids, extra_files=config.data.open_vocabulary().files)
            return
        hf.save(model, directory, dtype="float32", token_ids=token_ids, extra_files=config.data.open_vocabulary().files)

    loop.train(
        config,
        arguments.workdir,
        mesh=mesh,
        architecture=architecture,
        initial_model=initial_model,
        token_ids=token_ids,
        records=records,
        export=export,
        teacher=teacher(),
        trace=trace,
    )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


if __name__ == "__main__":
    command_line.run(main)
