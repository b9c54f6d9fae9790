"""A run's folder: whose it is, who writes in it now, and what appears there when it is complete."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from gqa.checkpoints.hf_config import read_json
from gqa.errors import InputError
from gqa.training.config import MAY_CHANGE, RunConfig, flatten, to_json

CONFIG = "config.json"
FINISHED = "finished.json"
LOCK = "lock"  # stays when the run ends; that it is locked is what counts
MODEL, ADAPTER = "model", "adapter"
UNFINISHED = "unfinished"  # where these are written before they get their names


def check(workdir: Path, config: RunConfig, what: str = "workdir") -> None:
    """Raises `InputError` when a folder, called `what`, holds a finished or another run, or something else."""
    if not (found := _config_of(workdir)):
        # A kill may have left the unfinished config of this very call.
        ours = {_unfinished(Path(CONFIG)).name, LOCK}
        if workdir.exists() and {path.name for path in workdir.iterdir()} - ours:
            raise InputError(f"{what} {workdir} is not empty and holds no run; choose a new folder")
        return
    found, expected = flatten(found), flatten(to_json(config))
    for name in sorted({*found, *expected} - set(MAY_CHANGE)):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{what} {workdir} holds a run with {name}={found.get(name)!r}, this one has {expected.get(name)!r}; "
                "choose another folder or the same value"
            )
    if (workdir / FINISHED).exists():
        steps = read_json(workdir / FINISHED)["step"]
        if steps >= config.steps:
            raise InputError(
                f"{what} {workdir} holds a finished run of {steps} steps; choose another folder or more steps"
            )


def make(folder: Path, what: str) -> None:
    """Makes a folder where it is not there; raises `InputError` for one, called `what`, that cannot be written in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {folder} cannot be made ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{what} {folder} cannot be written in; choose another folder")


def claim(workdir: Path, config: RunConfig, what: str = "workdir") -> None:
    """Makes a folder this run's; raises as `check` does."""
    check(workdir, config, what)
    if not _config_of(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG, to_json(config))
    (workdir / FINISHED).unlink(missing_ok=True)


def started(workdir: Path) -> float:
    """When the run in `workdir` was started for the first time, in seconds since 1970."""
    return (workdir / CONFIG).stat().st_mtime


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps every other process from `workdir`; raises `InputError`, naming its process, when a living run has it.

    The lock is the system's, which a killed process does not keep.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"workdir {workdir} is in use by a living run ({file.read().strip()}); wait for it, stop it, or choose "
                "another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_free(workdir: Path) -> None:
    """Raises the `InputError` of `locked` when a living run has `workdir`; makes nothing."""
    if (workdir / LOCK).is_file():
        with locked(workdir):
            pass


def replace(workdir: Path, name: str, export: Callable[[Path], None]) -> None:
    """Puts the folder that `export` writes at `workdir/name`, there when it is complete."""
    unfinished = workdir / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed here
    export(unfinished / name)
    shutil.rmtree(workdir / name, ignore_errors=True)  # of this run when it had fewer steps
    (unfinished / name).rename(workdir / name)
    unfinished.rmdir()


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, there when it is complete."""
    _unfinished(path).write_text(json.dumps(content, indent=2) + "\n")
    os.replace(_unfinished(path), path)


def _config_of(workdir: Path) -> dict:
    """The configuration of the run in `workdir`; empty when there is none."""
    found = read_json(workdir / CONFIG) if (workdir / CONFIG).exists() else {}
    return found if "train" in found else {}


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".tmp")
