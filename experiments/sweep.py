"""python -m experiments.sweep --config=configs/sweeps/groups.py --workdir=DIR [--known=FILE] [--worker=I/N] [--list] …

Runs every combination of a sweep: teacher x method x key/value heads x α x seed. A run converts the teacher, uptrains
the conversion for α of the pre-training and scores it; where the sweep says so it is also fine-tuned on a task, its
answers are scored, and "TASK loss" is the last held-out loss of the fine-tuning. The method `scratch` converts nothing:
it trains the teacher's own configuration from new weights, with so many key/value heads and as many parameters (a wider
FFN makes up for the heads, as in Llama 2, appendix A.2.1).
All by the project's own commands; what they print goes to the run's log.txt.

Finished runs are skipped, interrupted ones go on, one that fails is listed with its reason and does not stop the
others. sweep.json holds the settings of a folder's runs; a sweep of other settings than these is refused there. All
cells get their first seed before any gets its second: a sweep that is cut short leaves whole tables. The results are
one tidy table, results.csv and results.json in the folder of the sweep, written after every run; --known takes over the
runs of a results.json from another machine or another day.

Several processes may work on one folder: --worker=2/8 takes every eighth run from the third on, and --array=8 writes
array.sh, for `sbatch` or for a plain shell.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from gqa import command_line, files
from gqa.errors import InputError

AXES = ("teacher", "method", "kv_heads", "alpha", "seed")
SCORES = ("loss", "accuracy", "target_tokens")
SCRATCH = "scratch"  # a method; its α is 1
DRAWN = ("random", "+")  # methods, or marks of methods, whose conversion depends on the seed
RESULT, FAILED, LOG, LOCK, METRICS = "result.json", "failed.json", "log.txt", ".lock", "metrics.jsonl"
EXAMPLES = {"alpha": "0.05", "kv_heads": "2", "seed": "1"}
COMMANDS = "commands.json"  # those that are over of a run at work, and their seconds
SETTINGS = "sweep.json"  # of the sweep whose runs the folder holds


class Run(NamedTuple):
    """One combination; `method` is "none" for the teacher itself."""

    teacher: str
    method: str
    kv_heads: int
    alpha: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.teacher}-{self.method}-k{self.kv_heads}-a{self.alpha:g}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Of a task: the config of its training, and the held-out rows, lengths and metrics of its scores."""

    config: str
    overrides: tuple | list
    rows: int
    inputs_length: int
    max_new_tokens: int
    metrics: str

    def check(self, task: str) -> None:
        """Raises `InputError` for what would otherwise fail only once a run's model is uptrained."""
        from gqa.evaluation import text_metrics

        if not Path(self.config).exists():
            raise InputError(f"finetune.{task}.config: {self.config} is missing; run from the project's root")
        for name in ("rows", "inputs_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"finetune.{task}.{name} is {getattr(self, name)}; expected 1 or more")
        for metric in self.metrics.split(","):
            text_metrics.check(metric)
        trained = (command_line.load_config(self.config, self.overrides).get("data") or {}).get("task")
        if trained != task:
            raise InputError(
                f"finetune.{task} trains on {trained}; expected --config.data.task={task} among its overrides"
            )


def main() -> int | None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # array.sh repeats the command line without --array and --worker
    )
    command_line.add_config_argument(parser)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs and the results")
    parser.add_argument(
        "--known",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="results.json of runs that need not be done again; may be repeated",
    )
    parser.add_argument("--worker", default="0/1", metavar="I/N", help="the share of the runs to do here, from 0/N")
    parser.add_argument("--list", action="store_true", help="only say which runs are done, failed and waiting")
    parser.add_argument(
        "--array", type=int, metavar="N", help="only write array.sh, which does the runs in N processes"
    )
    arguments, config = command_line.parse(parser)
    number, of = _worker(arguments.worker)
    if arguments.array is not None and arguments.array < 1:
        raise InputError(f"--array={arguments.array}; expected 1 process or more")
    sweep = Sweep(config, arguments.workdir)
    known: dict[str, dict[str, Any]] = {}  # of two of one name the first
    for path in arguments.known:
        known = sweep.finished(path) | known
    if arguments.list:
        sweep.check_settings(arguments.workdir)
        sweep.report(known)
        return None
    sweep.claim()
    if arguments.array is not None:
        print(f"wrote {_write_array(arguments, sys.argv[1:])}")
        return None
    sweep.know(known)
    sweep.do(sweep.runs[number::of])
    failed = sweep.collect()
    sweep.report({})
    return 1 if failed else None


def _worker(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise InputError(f"--worker={text}; expected I/N with I from 0 to N-1, such as 0/8")
    return int(number), int(of)


def _write_array(arguments: argparse.Namespace, words: Sequence[str]) -> Path:
    """A script that SLURM runs as an array of N jobs, and a shell as N processes."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in ("--array", "--worker"):
            next(rest)  # its value
        elif not word.startswith(("--array=", "--worker=")):
            kept.append(word)
    command = shlex.join([sys.executable, "-m", "experiments.sweep", *kept])
    path = arguments.workdir / "array.sh"
    path.write_text(
        "#!/usr/bin/env bash\n"
        f"#SBATCH --array=0-{arguments.array - 1}\n"
        "# Under SLURM a job of the array; else all of them, side by side.\n"
        f"cd {shlex.quote(str(Path.cwd()))}\n"
        'if [ -n "${SLURM_ARRAY_TASK_ID-}" ]; then\n'
        f'    exec {command} --worker="$SLURM_ARRAY_TASK_ID/{arguments.array}"\n'
        "fi\n"
        "processes=() code=0\n"
        # Bash starts what it leaves in the background deaf to Ctrl-C.
        "trap 'kill \"${processes[@]}\" 2>/dev/null; wait; exit 130' INT TERM\n"
        f"for worker in $(seq 0 {arguments.array - 1}); do\n"
        f'    {command} --worker="$worker/{arguments.array}" &\n'
        '    processes+=("$!")\n'
        "done\n"
        'for process in "${processes[@]}"; do\n'
        '    wait "$process" || code=$?\n'
        "done\n"
        'exit "$code"\n'
    )
    path.chmod(0o755)
    return path


class Sweep:
    """A config's runs, and the folder in which they are done.

    Raises `InputError` for a config of another kind, an empty or unknown axis and a teacher that is not there.
    """

    def __init__(self, config, workdir: Path):
        missing = [name for name in ("teachers", "runs", "overrides") if name not in config]
        missing += [f"runs.{name}" for name in AXES[1:] if not missing and name not in config.runs]
        if missing:
            raise InputError(f"the config has no {missing[0]}; expected a sweep's, such as configs/sweeps/groups.py")
        sections = {"teachers": config.teachers, "runs": config.runs}
        sections |= {name: config.get(name) or {} for name in ("finetune", "calibration")}
        for kind in ("teachers", "finetune"):
            sections |= {f"{kind}.{name}": each for name, each in _items(sections[kind])}
        for name, section in sections.items():
            if not hasattr(section, "items"):
                raise InputError(f"{name} is {section!r}; expected a section, as in configs/sweeps/docstring.py")
        options = config.overrides
        if not isinstance(options, tuple | list) or not all(isinstance(option, str) for option in options):
            raise InputError(f"overrides is {options!r}; expected several options, such as ('--config.train.seed=1',)")
        for name in AXES[1:]:
            if not isinstance(config.runs[name], tuple | list):
                raise InputError(f"runs.{name} is {config.runs[name]!r}; expected several values, such as (1, 2)")
        self.workdir = workdir
        self._config = config
        self._finetune = {
            task: command_line.build(FineTuning, dict(choice), f"finetune.{task}")
            for task, choice in sections["finetune"].items()
        }
        for task, choice in self._finetune.items():
            choice.check(task)
        self._teachers = {name: dict(teacher) for name, teacher in config.teachers.items()}
        methods = set(config.runs.method)
        self._query_heads = {
            name: _check_teacher(name, teacher, methods, options) for name, teacher in self._teachers.items()
        }
        empty = [name for name in AXES[1:] if not config.runs[name]] or (["teachers"] if not self._teachers else [])
        if empty:
            raise InputError(f"runs.{empty[0]} is empty; give one value or more")
        self.runs = list(dict.fromkeys(self._runs()))

    def _runs(self) -> Iterator[Run]:
        from gqa.convert.calibrated import Method

        axes = self._config.runs
        for method in axes.method:
            if not isinstance(method, str):
                raise InputError(f"runs.method holds {method!r}; expected names such as mean")
            if method != SCRATCH:
                Method.parse(method)
        for name, kind in (("alpha", int | float), ("kv_heads", int), ("seed", int)):
            if wrong := [value for value in axes[name] if not isinstance(value, kind) or isinstance(value, bool)]:
                raise InputError(f"runs.{name} holds {wrong[0]!r}; expected numbers such as {EXAMPLES[name]}")
        for teacher in self._teachers:
            combinations = itertools.product(axes.seed, axes.alpha, axes.kv_heads, axes.method)
            for seed, alpha, kv_heads, method in combinations:
                if not 0 <= alpha <= 1:
                    raise InputError(f"runs.alpha holds {alpha}; expected shares of the pre-training, 0 to 1")
                if method == SCRATCH:
                    alpha = 1.0
                elif kv_heads == self._teachers[teacher]["kv_heads"]:
                    method = "none"
                if alpha == 0 and not self._finetune and not any(mark in method for mark in DRAWN):
                    seed = axes.seed[0]  # nothing is drawn: the others are the same run
                yield Run(teacher, method, kv_heads, float(alpha), seed)

    def claim(self) -> None:
        """Makes the folder and notes the settings of its runs there: a finished run is skipped as long as they hold.

        More teachers may come in. Raises `InputError` where the folder's runs have other settings.
        """
        earlier = self.check_settings(self.workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        # Beside them the teachers' query heads, for the figures: as many key/value heads are MHA.
        ours = self._settings() | {f"query_heads.{name}": heads for name, heads in self._query_heads.items()}
        if earlier | ours != earlier:
            files.write_json(self.workdir / SETTINGS, earlier | ours, shared=True)

    def check_settings(self, folder: Path) -> dict[str, Any]:
        """The settings of the runs in a folder, if any; raises `InputError` where they are not this sweep's."""
        path = folder / SETTINGS
        earlier = _read(path)
        if earlier is None and path.exists():
            raise InputError(f"{path} is damaged; delete it if the runs beside it have this sweep's settings")
        for name, ours in self._settings().items():
            if (earlier or {}).get(name, ours) != ours:
                raise InputError(
                    f"{path}: runs in this folder have {name}={json.dumps(earlier[name])}, this sweep has "
                    f"{json.dumps(ours)}; expected the same or another folder"
                )
        return earlier or {}

    def _settings(self) -> dict[str, Any]:
        config = {"calibration": {}, "finetune": {}} | self._config.to_dict()
        settings = {name: config[name] for name in ("calibration", "overrides", "finetune")}
        settings |= {f"teachers.{name}": teacher for name, teacher in self._teachers.items()}
        return json.loads(json.dumps(settings, default=str))  # as they are read

    def finished(self, path: Path) -> dict[str, dict[str, Any]]:
        """The runs of a results.json that have this sweep's scores, by name; of two of one name the first.

        Raises `InputError` for a file that is none, and where the settings beside it are not this sweep's.
        """
        from gqa.checkpoints import hf_config

        self.check_settings(path.parent)
        rows = hf_config.read_json(path).get("runs")
        try:
            names = [Run(*(row[name] for name in AXES)).name for row in rows]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"--known={path} is no results.json of a sweep; expected its list of runs") from None
        found = [(name, row) for name, row in zip(names, rows, strict=True) if self._is_scored(row)]
        if len(found) < len(names):
            print(f"--known={path}: {len(names) - len(found)} runs lack scores of this sweep and are left out")
        return dict(reversed(found))

    def know(self, known: Mapping[str, dict[str, Any]]) -> None:
        """Takes over finished runs, by name."""
        for run in self.runs:
            if run.name in known and self._result(run) is None:
                folder = self.workdir / run.name
                folder.mkdir(exist_ok=True)
                files.write_json(folder / RESULT, known[run.name], shared=True)

    def _result(self, run: Run) -> dict[str, Any] | None:
        """The row of a finished run; None where there is none, a damaged one or one without this sweep's scores."""
        row = _read(self.workdir / run.name / RESULT) or {}
        is_its_own = all(row.get(name) == value for name, value in run._asdict().items())
        return row if is_its_own and self._is_scored(row) else None

    def _is_scored(self, row: dict[str, Any]) -> bool:
        tasks = all(any(name.startswith(f"{task} ") for name in row) for task in self._finetune)
        return tasks and all(isinstance(row.get(name), int | float) for name in SCORES)

    def do(self, runs: Sequence[Run]) -> None:
        """Does what is not done of `runs`; one that another process is at is looked at again in the end."""
        with tqdm(total=len(runs), desc="runs", unit="run", dynamic_ncols=True) as bar:
            busy = [run for run in runs if not self._once(run, bar, wait=False)]
            for run in busy:
                self._once(run, bar, wait=True)

    def _once(self, run: Run, bar: tqdm, *, wait: bool) -> bool:
        """Whether a run is over now, well or not."""
        folder = self.workdir / run.name
        folder.mkdir(exist_ok=True)
        with _locked(folder / LOCK, wait) as lock:
            if lock is None:
                return False
            if self._result(run) is None:
                bar.set_postfix_str(run.name)
                self._work(run, folder, lock)
                self.collect()
            bar.update()
            return True

    def _work(self, run: Run, folder: Path, lock: int) -> None:
        (folder / FAILED).unlink(missing_ok=True)
        log = folder / LOG
        seconds = {
            name: each for name, each in (_read(folder / COMMANDS) or {}).items() if isinstance(each, int | float)
        }
        command = failure = None
        try:
            for module, arguments in self._commands(run, folder):
                command, start = shlex.join(["python", "-m", module, *arguments]), time.time()
                before = log.stat().st_size if log.exists() else 0
                code = _call(module, arguments, log, lock)
                if code:
                    failure = {"command": command, "code": code, "reason": _reason(log, before, code)}
                    break
                seconds[command] = seconds.get(command, 0.0) + time.time() - start
                files.write_json(folder / COMMANDS, seconds)
            else:
                self._finish(run, folder, seconds)
        except InputError as error:  # a command that cannot be made
            failure = {"command": None, "code": 2, "reason": " ".join(str(error).splitlines())}
        except Exception as error:  # whatever else it is, the other runs go on
            reason = f"{type(error).__name__}: {' '.join(str(error).splitlines())}"
            failure = {"command": command, "code": 1, "reason": reason}
        if failure:
            files.write_json(folder / FAILED, run._asdict() | failure)

    def _finish(self, run: Run, folder: Path, seconds: dict[str, float]) -> None:
        """Writes the result of a run whose commands are over, and deletes its checkpoints unless they are kept."""
        from experiments import measure

        result = run._asdict() | self._scores(folder)
        if (history := folder / "uptrained" / METRICS).exists():
            shutil.copy(history, folder)  # for the figure of stability
        # The processor, not the accelerator: to ask for one would take it from the commands.
        origin = {"seconds": sum(seconds.values()), "cpu": measure.cpu(), "commit": measure.commit()}
        files.write_json(folder / RESULT, result | origin | {"commands": list(seconds)})
        (folder / COMMANDS).unlink(missing_ok=True)
        for name in () if self._config.get("keep_checkpoints") else ("converted", "uptrained", *self._finetune):
            shutil.rmtree(folder / name, ignore_errors=True)

    def _scores(self, folder: Path) -> dict[str, float]:
        """What the commands of a run have found."""
        from gqa.training import metrics

        scores = json.loads((folder / "evaluation.json").read_text())
        found = {name: scores[name] for name in SCORES}
        for task in self._finetune:
            (checkpoint,) = json.loads((folder / f"{task}-scores" / "scores.json").read_text())["checkpoints"].values()
            found |= {f"{task} {name}": score["value"] for name, score in checkpoint["scores"][task].items()}
            heldout = [line["loss"] for line in metrics.read(folder / task) if line["split"] == "heldout"]
            found |= {f"{task} loss": loss for loss in heldout[-1:]}
        return found

    def _commands(self, run: Run, folder: Path) -> Iterator[tuple[str, list[str]]]:
        """The commands still to do of a run: module and arguments."""
        checkpoint = yield from (self._from_scratch if run.method == SCRATCH else self._from_teacher)(run, folder)
        for task, choice in self._finetune.items():
            yield from _finetuning(task, choice, run, checkpoint, folder)

    def _from_teacher(self, run: Run, folder: Path) -> Generator[tuple[str, list[str]], None, Path]:
        """Those that convert, uptrain and score; gives the checkpoint."""
        teacher = self._teachers[run.teacher]
        checkpoint, uptrain = Path(teacher["checkpoint"]), f"--config={teacher['uptrain']}"
        if run.method != "none":
            source, checkpoint = checkpoint, folder / "converted"
            if not checkpoint.exists():
                arguments = [f"--source={source}", f"--output={checkpoint}", f"--kv_heads={run.kv_heads}"]
                arguments += [f"--method={run.method}", f"--seed={run.seed}", "--dtype=float32"]
                if {"group", "tune", "refit"} & set(run.method.split("+")):
                    calibration = self._config.get("calibration") or {}
                    arguments += [f"--{name}={value}" for name, value in calibration.items()]
                yield "checkpoints_tools.convert", arguments
        start = f"--config.model.checkpoint={checkpoint}"
        overrides = list(self._config.overrides)
        if run.alpha:
            if not (folder / "uptrained" / "finished.json").exists():
                _follow(folder / "uptrained", checkpoint)
                arguments = [uptrain, f"--workdir={folder / 'uptrained'}", start, *overrides]
                yield (
                    "gqa.train",
                    [*arguments, f"--config.uptrain.alpha={run.alpha}", f"--config.train.seed={run.seed}"],
                )
            checkpoint = folder / "uptrained" / "model"
        output = f"--output={folder / 'evaluation.json'}"
        yield "gqa.evaluate", [uptrain, start, f"--checkpoint={checkpoint}", output, *overrides]
        return checkpoint

    def _from_scratch(self, run: Run, folder: Path) -> Generator[tuple[str, list[str]], None, Path]:
        """Those that train new weights and score; gives the checkpoint."""
        pretrain, trained = Path(self._teachers[run.teacher]["pretrain"]), folder / "uptrained"
        overrides = list(self._config.overrides)
        if not (trained / "finished.json").exists():
            changes = _equal_parameters(command_line.load_config(pretrain), run.kv_heads)
            arguments = [f"--config.model.changes.{name}={value}" for name, value in changes.items()]
            seed = f"--config.train.seed={run.seed}"
            yield "gqa.train", [f"--config={pretrain}", f"--workdir={trained}", *arguments, seed, *overrides]
        output = f"--output={folder / 'evaluation.json'}"
        yield "gqa.evaluate", [f"--config={pretrain}", f"--checkpoint={trained / 'model'}", output, *overrides]
        return trained / "model"

    def state(self, known: Mapping[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
        """The results so far, the known ones among them, the failed runs and the number of the others."""
        done, failed, waiting = [], [], 0
        for run in self.runs:
            folder = self.workdir / run.name
            if (row := self._result(run) or known.get(run.name)) is not None:
                done.append(row)
            elif "reason" in (row := _read(folder / FAILED) or {}):
                failed.append(row | run._asdict())
            else:
                waiting += 1
        return done, failed, waiting

    def report(self, known: Mapping[str, dict[str, Any]]) -> None:
        """Prints what `state` gives."""
        done, failed, waiting = self.state(known)
        for row in done:
            print("  ".join(f"{name}={row[name]:g}" if name == "alpha" else f"{row[name]}" for name in AXES), end="  ")
            print(f"loss {row['loss']:.4f}")
        for row in failed:
            print(f"failed: {Run(*(row[name] for name in AXES)).name}: {row['reason']}")
        print(f"{len(done)} done, {len(failed)} failed, {waiting} waiting; {self.workdir / 'results.csv'}")

    def collect(self) -> list[dict[str, Any]]:
        """Writes the results so far; the failed runs."""
        done, failed, waiting = self.state({})
        columns = list(dict.fromkeys([*AXES, *SCORES, *(name for row in done for name in row if name != "commands")]))
        files.write_json(
            self.workdir / "results.json", {"runs": done, "failed": failed, "waiting": waiting}, shared=True
        )
        with (
            files.whole(self.workdir / "results.csv", shared=True) as unfinished,
            unfinished.open("w", encoding="utf-8", newline="") as file,
        ):
            table = csv.DictWriter(file, columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(done)
        return failed


def _architecture(config):
    """Of the new model that a config trains."""
    from gqa import models

    return dataclasses.replace(models.size(config.model.size), **config.model.changes)


def _equal_parameters(config, kv_heads: int) -> dict[str, int]:
    """Changes of a config's model: so many key/value heads where conversions have them, and an FFN that makes up."""
    from gqa import models

    model = _architecture(config)
    sites = models.FAMILIES[models.family_of(model)].converted_sites
    heads = {f"{site}_kv_heads": kv_heads for site in sites}

    def size(**changes) -> int:
        return models.num_parameters(models.abstract(dataclasses.replace(model, **changes)))

    one_wider = size(d_ff=model.d_ff + 1) - size()
    return heads | {"d_ff": model.d_ff + round((size() - size(**heads)) / one_wider)}


def _items(section) -> list[tuple[str, Any]]:
    return list(section.items()) if hasattr(section, "items") else []


def _check_teacher(name: str, teacher: dict[str, Any], methods: set[str], overrides: Sequence[str]) -> int:
    """The teacher's query heads; raises `InputError` for what would otherwise fail in every run."""
    from gqa import checkpoints, models

    if Path(name).name != name:
        folder = name.replace("/", "_")
        raise InputError(f"teachers.{name}: no folder can have this name; expected one; nearest: {folder}")
    if not isinstance(kv_heads := teacher.get("kv_heads"), int):
        raise InputError(f"teachers.{name}.kv_heads is {kv_heads}; expected the teacher's number of key/value heads")
    needed = ["pretrain"] * (SCRATCH in methods) + ["uptrain", "checkpoint"] * (methods != {SCRATCH})
    for key in needed:
        if not isinstance(path := teacher.get(key), str | Path) or not Path(path).exists():
            raise InputError(f"teachers.{name}.{key}: {path} is missing; run from the project's root")
        if key != "checkpoint":
            config = command_line.load_config(path, overrides)
    if "checkpoint" not in needed:
        return _architecture(config).num_heads
    choices = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)
    config = checkpoints.read(path, **choices).config
    sites = models.FAMILIES[models.family_of(config)].converted_sites
    found = sorted({K for site in sites for K in config.kv_heads(site)})
    if found != [kv_heads]:
        raise InputError(
            f"teachers.{name}.kv_heads is {kv_heads}, {path} has {', '.join(map(str, found))}; expected the same"
        )
    return config.num_heads


def _finetuning(
    task: str, choice: FineTuning, run: Run, checkpoint: Path, folder: Path
) -> Iterator[tuple[str, list[str]]]:
    """The commands still to do until a run's model is fine-tuned on a task and scored on its held-out examples."""
    tuned, rows = folder / task, folder / f"{task}.jsonl"
    if not (tuned / "finished.json").exists():
        _follow(tuned, checkpoint)
        arguments = [f"--config={choice.config}", f"--workdir={tuned}", f"--config.model.checkpoint={checkpoint}"]
        yield "gqa.train", [*arguments, f"--config.train.seed={run.seed}", *choice.overrides]
    if not rows.exists():
        source = command_line.load_config(choice.config, choice.overrides).data.source
        arguments = [f"--task={task}", *([f"--source={source}"] if source else [])]
        yield "gqa.data.tasks", [*arguments, f"--limit={choice.rows}", f"--output={rows}"]
    settings = [f"--{name}={getattr(choice, name)}" for name in ("metrics", "inputs_length", "max_new_tokens")]
    output = f"--output={folder / f'{task}-scores'}"
    yield "gqa.evaluate", [f"--checkpoint={tuned / 'model'}", f"--task_file={rows}", *settings, output]


def _follow(workdir: Path, checkpoint: Path) -> None:
    """Lets a training that was cut short find the checkpoint it started from where the sweep's folder has moved."""
    content = _read(path := workdir / "config.json")
    if content and isinstance(model := content.get("model"), dict) and model.get("checkpoint") != str(checkpoint):
        files.write_json(path, content | {"model": model | {"checkpoint": str(checkpoint)}})


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[int | None]:
    """A descriptor that holds the lock of a run, or None where another process holds it and is not waited for."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield lock
        except BlockingIOError:
            yield None
    finally:
        os.close(lock)


def _call(module: str, arguments: Sequence[str], log: Path, lock: int) -> int:
    """Runs a command of the project; its exit code. It inherits the lock: a run is free when nothing works on it."""
    parent = os.getpid()

    def end_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    with log.open("a") as file:
        return subprocess.call(
            [sys.executable, "-m", module, *arguments],
            stdout=file,
            stderr=file,
            pass_fds=(lock,),
            preexec_fn=end_with_parent,
        )


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of a run; None where it is missing or damaged: what it was of is then done again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _reason(log: Path, start: int, code: int) -> str:
    """Why a command ended with `code`: its error, else what it said last, in the log from the byte `start` on."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]  # of a bar its last state
    errors = [line for line in lines if line.startswith("error:")]
    if errors:
        return errors[-1]
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{ended}; it said last: {lines[-1]}" if lines else f"{ended}; it said nothing"


if __name__ == "__main__":
    command_line.run(main)
