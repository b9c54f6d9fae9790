"""Our own store of training states: Orbax's arrays, written in the background, with a SHA-256 of every file.

A step is a folder that appears when it is complete:

    20/default/      the arrays, as Orbax writes them
    20/metrics.jsonl and what else `save` was given
    20/save.json     {"time": …, "bytes": {file: size}, and what `save` was told}
    20/SHA256SUMS    of every other file; checked before anything is restored
"""

import contextlib
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tqdm import tqdm

from gqa import distributed
from gqa.checkpoints.hf_config import read_json
from gqa.checkpoints.sums import hash_files
from gqa.checkpoints.training_run import ARRAYS, SAVE, files_of, problem_of
from gqa.checkpoints.writer import SUMS
from gqa.errors import InputError
from gqa.files import sync

# A step's folder under another name: not complete yet, or not wanted any more. Nobody reads it.
_UNFINISHED, _UNWANTED = ".unfinished", ".unwanted"

# A save that fails is one line of ours; Orbax logs it three times more, with tracebacks.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Store:
    """Checkpoints of a run under `directory/<step>/`.

    A state is any pytree of arrays; it is stored as a flat dictionary keyed by `jax.tree_util.keystr`, so that a
    checkpoint can be read without the classes that made it.

    Args:
      directory: of the steps.
      keep: newest steps that stay. The one with the least held-out loss stays as well.
      keep_minutes: beside these, one step of every so many minutes; `None`: none.
      mirror: folder that gets a copy of each step, and gives it back where `directory` has it damaged or not at all.
    """

    def __init__(self, directory: Path, keep: int, *, keep_minutes: float | None = None, mirror: Path | None = None):
        self._directory, self._mirror = Path(directory).absolute(), mirror and Path(mirror).absolute()
        self._keep, self._keep_minutes = keep, keep_minutes
        self._checkpointer = _checkpointer()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._save: Future | None = None
        self._damaged: set[int] = set()
        if jax.process_index() == 0:
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
                for path in folder.iterdir():  # what a kill left behind
                    if path.suffix in (_UNFINISHED, _UNWANTED):
                        _discard(path)

    @property
    def _folders(self) -> list[Path]:
        return [self._directory] + ([self._mirror] if self._mirror else [])

    def steps(self) -> list[int]:
        """Steps that are here, intact or not, oldest first."""
        return sorted({step for folder in self._folders for step in _steps(folder)})

    def latest_step(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def folder(self, step: int) -> Path:
        """Where the files of a restored step are."""
        return self._directory / str(step)

    def save(
        self,
        step: int,
        state,
        *,
        losses: Mapping[int, float] | None = None,
        files: Sequence[Path] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Copies `state` off the device and writes it in the background; it appears when it is complete.

        A save that fails, as on a full disk, is a line on stderr; earlier steps stay as they are.

        Args:
          step: its number; what may be here of that number is replaced.
          state: of arrays.
          losses: held-out loss by step, for those that have one: the step with the least stays.
          files: copied into the step's folder, soon.
          facts: what `facts(step)` gives back; JSON.
        """
        self.wait()
        unfinished = self._directory / f"{step}{_UNFINISHED}"
        try:
            if jax.process_index() == 0:
                _delete(unfinished)  # of a save that failed
                unfinished.mkdir()
            self._checkpointer.save(unfinished / ARRAYS, args=ocp.args.StandardSave(_flat(state)))
        except OSError as error:
            self._failed(step, error)
            return
        # The dictionary goes on changing.
        self._save = self._background.submit(self._finish, step, dict(losses or {}), list(files), dict(facts or {}))

    def wait(self) -> None:
        """Returns when everything is on disk, the mirror's copy too."""
        save, self._save = self._save, None
        if save is not None:
            save.result()
            distributed.on_primary(lambda: None)  # which gives it its name after the others are done

    def restore(self, step: int, like):
        """The state of `step`, shaped, typed and placed as `like` (arrays or `ShapeDtypeStruct`s with shardings).

        Raises `InputError` when the checkpoint is damaged or holds another model.
        """
        problem = self._problem(step)
        if problem:
            raise InputError(problem)
        return self._load(step, like)

    def restore_newest(self, like, until: int | None = None) -> tuple[int, Any] | None:
        """The newest intact step (up to `until`) and its state; `None` where there is no step at all.

        Damaged steps are skipped, with a line on stderr; the next save removes them. Raises `InputError` when every
        step is damaged, or the one found holds another model.
        """
        problems = {}
        for step in reversed([step for step in self.steps() if until is None or step <= until]):
            problem = self._problem(step)
            if not problem:
                if problems:
                    _warn(f"{_damage(problems)}; going on from step {step}")
                return step, self._load(step, like)
            problems[step] = problem
            self._damaged.add(step)
        if problems:
            raise InputError(f"{_damage(problems)}; there is no other: bring back a copy, or choose a new folder")
        return None

    def facts(self, step: int) -> dict[str, Any]:
        """What `save` was told about a restored step, with `time`, when it was saved (seconds since 1970)."""
        return read_json(self.folder(step) / SAVE)

    def thin(self, losses: Mapping[int, float]) -> None:
        """Removes what `save` would have, had a kill not come between; for a run that goes on, after `restore_newest`.

        Where that skipped damaged steps nothing goes before the next save has made a new one.
        """
        if jax.process_index() == 0 and not self._damaged:
            for folder in self._folders:
                try:
                    self._thin(folder, losses)
                except OSError as error:
                    _warn(f"older checkpoints in {folder} could not be removed: {_reason(error)}")

    def discard_after(self, step: int) -> None:
        """Removes every later step."""
        self.wait()
        if jax.process_index() == 0:
            for folder in self._folders:
                for later in _steps(folder):
                    if later > step:
                        _remove(folder / str(later))

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        """Waits and releases the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def _load(self, step: int, like):
        self.wait()
        path, wanted = self.folder(step) / ARRAYS, _flat(like)
        expected = {key: tuple(leaf.shape) for key, leaf in wanted.items()}
        stored = self._checkpointer.metadata(path).item_metadata.tree
        found = {key: tuple(leaf.shape) for key, leaf in stored.items()}
        for key in {**expected, **found}:
            if found.get(key) != expected.get(key):
                raise InputError(
                    f"checkpoint of step {step} is of another model: {key} has shape {found.get(key)}, "
                    f"expected {expected.get(key)}"
                )
        flat = self._checkpointer.restore(path, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(jax.tree.structure(like), [flat[key] for key in wanted])

    def _problem(self, step: int) -> str | None:
        """Why `step` cannot be restored, found by the first process for all; fetches it from the mirror if need be."""
        problem = None
        if jax.process_index() == 0:
            problem = problem_of(self.folder(step))
            if problem and self._mirror and not problem_of(self._mirror / str(step)):
                _warn(f"{problem}; its copy in {self._mirror} is used")
                _copy(self._mirror / str(step), self.folder(step))
                problem = None
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
            problem = problem or f"{self.folder(step)} is damaged"
        return problem

    def _finish(self, step: int, losses: Mapping[int, float], files: Sequence[Path], facts: dict) -> None:
        """In the background: waits for the arrays of all processes; the first one then makes them a checkpoint."""
        unfinished = self._directory / f"{step}{_UNFINISHED}"
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() != 0:
                return
            for file in files:
                shutil.copyfile(file, unfinished / file.name)
            sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in files_of(unfinished)}
            (unfinished / SAVE).write_text(json.dumps({**facts, "time": time.time(), "bytes": sizes}, indent=1))
            sums = hash_files(unfinished, files_of(unfinished), {})
            (unfinished / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
            _replace(unfinished, self._directory / str(step))
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            self._failed(step, error)
            return
        damaged, self._damaged = self._damaged - {step}, set()
        try:
            for number in damaged:
                _remove(self._directory / str(number))
            self._thin(self._directory, losses)
        except OSError as error:
            _warn(f"older checkpoints in {self._directory} could not be removed: {_reason(error)}")
        if self._mirror:
            try:
                _copy(self._directory / str(step), self._mirror / str(step))
                for number in damaged:  # else it would count among those that are kept
                    if (self._mirror / str(number)).is_dir() and problem_of(self._mirror / str(number)):
                        _remove(self._mirror / str(number))
                self._thin(self._mirror, losses)
            except (OSError, InputError) as error:
                _warn(f"checkpoint of step {step} has no copy in {self._mirror}: {_reason(error)}")

    def _failed(self, step: int, error: Exception) -> None:
        # It may hold a second error of this save, and raise it in the next.
        with contextlib.suppress(OSError, ValueError):
            self._checkpointer.close()
        self._checkpointer = _checkpointer()
        shutil.rmtree(self._directory / f"{step}{_UNFINISHED}", ignore_errors=True)  # its bytes may be missing
        _warn(f"checkpoint of step {step} could not be saved: {_reason(error)}; the run goes on, older ones stay")

    def _thin(self, folder: Path, losses: Mapping[int, float]) -> None:
        times = {}
        for step in _steps(folder):
            with contextlib.suppress(InputError, KeyError):
                times[step] = float(read_json(folder / str(step) / SAVE)["time"])
        wanted = retained(_steps(folder), self._keep, times, self._keep_minutes, losses)
        for step in set(_steps(folder)) - wanted:
            _remove(folder / str(step))


def _checkpointer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())


def retained(
    steps: Sequence[int],
    keep: int,
    times: Mapping[int, float],
    keep_minutes: float | None,
    losses: Mapping[int, float],
) -> set[int]:
    """Those of `steps` that stay.

    They are the newest `keep`, the one with the least of `losses` (the earliest of equals), and, by `times` in seconds,
    the first and then each that comes `keep_minutes` or more after the last that stays for this reason.
    """
    steps = sorted(steps)
    wanted = set(steps[-keep:])
    scored = [step for step in steps if np.isfinite(losses.get(step, np.nan))]
    if scored:
        wanted.add(min(scored, key=lambda step: losses[step]))
    if keep_minutes is not None:
        last = -np.inf
        for step in (step for step in steps if step in times):
            if times[step] - last >= 60 * keep_minutes:
                wanted.add(step)
                last = times[step]
    return wanted


def _copy(source: Path, target: Path) -> None:
    """Copies a step's folder, complete and as its sums say or not at all."""
    unfinished = target.with_name(target.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(source, unfinished)
        if problem := problem_of(unfinished):
            raise InputError(problem)
        _replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _replace(unfinished: Path, target: Path) -> None:
    # On the disk before anything older goes: a power failure leaves this step or, whole, the ones before.
    for path in (*unfinished.rglob("*"), unfinished):
        sync(path)
    if target.exists():
        _remove(target)
    unfinished.rename(target)
    sync(target.parent)


def _remove(folder: Path) -> None:
    """Removes a step, which a kill meanwhile does not leave half there."""
    unwanted = folder.with_name(folder.name + _UNWANTED)
    _discard(unwanted)  # of a removal that failed
    with contextlib.suppress(FileNotFoundError):
        folder.rename(unwanted)
        _discard(unwanted)


def _discard(path: Path) -> None:
    """Deletes what nobody reads any more; where that fails, it is a line on stderr."""
    try:
        _delete(path)
    except OSError as error:
        _warn(f"{path} could not be removed: {_reason(error)}")


def _delete(path: Path) -> None:
    """Deletes a folder with all that is in it, or a file; what is not there is as it should be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]


def _flat(tree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _damage(problems: Mapping[int, str]) -> str:
    steps, first = ", ".join(map(str, problems)), next(iter(problems.values()))
    return f"checkpoint{'s' * (len(problems) > 1)} of step {steps} damaged ({first})"


def _reason(error: Exception) -> str:
    """The system's own words, without the path of calls that TensorStore puts before them and the details behind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    words = re.split(r" \[\w+=", " ".join(str(error).split()))[0]  # then details, in an order that changes
    return words.rpartition(": ")[2]


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
