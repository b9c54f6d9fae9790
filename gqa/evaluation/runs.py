"""`python -m gqa.evaluate` over several checkpoints: what each is asked, what is averaged, which is best."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa import files
from gqa.checkpoints import training_run
from gqa.decode.batches import Settings
from gqa.errors import InputError, nearest
from gqa.evaluation import consistency, generation, preferences, table, text_metrics
from gqa.evaluation.checkpoint_text import TextModel

LOSSES = ("loss", "perplexity", "accuracy")
SCORES, TABLE = "scores.json", "table.md"
CONSISTENCY = "consistency"


def checkpoints_of(paths: Sequence[Path], every_step: bool) -> dict[str, Path]:
    """The checkpoints by a short name: the folders themselves, or the steps that one run has kept."""
    if not every_step:
        return dict(zip(table.labels(paths), paths, strict=True))
    if len(paths) > 1:
        raise InputError(f"--every_checkpoint is of one run; found {len(paths)} --checkpoint")
    return {path.name: path for path in training_run.step_folders(paths[0])}


def compared_losses(found: Mapping[str, Mapping[str, Any]], every_step: bool) -> dict[str, Any]:
    """All scores with their mean and spread, or with the step of the lowest loss; printed."""
    compared: dict[str, Any] = {"checkpoints": dict(found)}
    if every_step:
        best = min(found, key=lambda name: (math.isnan(found[name]["loss"]), found[name]["loss"]))
        compared["best"] = found[best]["checkpoint"]
        print(f"\nbest: step {best}, loss {found[best]['loss']:.4f}")
    else:
        rows = [{name: scores[name] for name in LOSSES} for scores in found.values()]
        compared["mean"] = table.mean_and_spread(rows)
        print(f"\nmean of {len(rows)}")
        for name, both in compared["mean"].items():
            print(f"{name:30} {both['mean']:.4f} ± {both['spread']:.4f}")
    return compared


def generate_and_score(arguments: argparse.Namespace, evaluated: Mapping[str, Path]) -> None:
    """Answers of every checkpoint to every task file: predictions, scores and the table in `--output`."""
    tasks = read_tasks(arguments.task_file, arguments.metrics)
    if arguments.output is None:
        raise InputError("--task_file writes predictions and scores; expected --output=DIR")
    for name, least in (("max_new_tokens", 1), ("inputs_length", 2), ("bootstrap", 0), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name}={value} is below {least}; expected {least} or more")
    settings = Settings(
        max_new_tokens=arguments.max_new_tokens,
        eos_ids=(),
        sampling=None,
        seed=0,
        num_beams=arguments.beam,
        length_penalty=arguments.length_penalty,
        batch_size=arguments.batch_size,
    )
    models = {name: TextModel(path) for name, path in evaluated.items()}  # before anything is decoded
    _make_folder(arguments.output)
    metrics = {task.name: task.metrics for task in tasks}
    found: dict[str, dict[str, Any]] = {}
    for name in list(models):
        model = models.pop(name)  # one model in memory at a time
        found[name] = {}
        for task in tasks:
            folder = arguments.output / name / task.name
            answers = generation.answer(model, task.examples, settings, arguments.inputs_length, folder)
            found[name][task.name] = generation.scores(task, answers.texts, arguments.bootstrap, arguments.seed)
            print(f"{name} {task.name}: {len(answers.texts)} rows, {answers.padding:.1%} of what was read is padding")
            for score, interval in found[name][task.name].items():
                print(f"  {score:20} {interval['value']:6.2f}  [{interval['low']:.2f}, {interval['high']:.2f}]")
    rows = {name: table.headlines(scores, metrics) for name, scores in found.items()}
    content: dict[str, Any] = {
        "checkpoints": {name: {"path": str(evaluated[name]), "scores": scores} for name, scores in found.items()},
        "rows": {task.name: len(task.examples) for task in tasks},
        "settings": {name: getattr(arguments, name) for name in ("beam", "length_penalty", "max_new_tokens")}
        | {"inputs_length": arguments.inputs_length, "bootstrap": arguments.bootstrap, "seed": arguments.seed},
        "average": {name: table.average(row) for name, row in rows.items()},
    }
    if len(rows) > 1 and not arguments.every_checkpoint:
        content["mean"] = table.mean_and_spread([{"avg": table.average(row), **row} for row in rows.values()])
    text = table.table(rows, metrics, averaged=not arguments.every_checkpoint)
    print(f"\n{text}")
    if arguments.every_checkpoint:
        best = max(content["average"], key=content["average"].get)
        content["best"] = str(evaluated[best])
        print(f"\nbest: step {best}, {content['average'][best]:.2f}")
    files.write_json(arguments.output / SCORES, content)
    (arguments.output / TABLE).write_text(text + "\n")


def read_tasks(files: Sequence[Path], metrics: str | None) -> list[generation.Task]:
    """The rows of each file and their metrics: those of `--metrics`, or the usual one of a task of Table 1."""
    named = metrics.split(",") if metrics else []
    for metric in named:
        text_metrics.check(metric)
    tasks = []
    for file in files:
        if not named and file.stem not in table.TABLE_1:
            raise InputError(
                f"{file} has no metric of its own; expected --metrics={'|'.join(text_metrics.METRICS)} or a file named "
                f"as a task of Table 1; nearest: {nearest(file.stem, table.TABLE_1)}.jsonl"
            )
        if file.stem in [task.name for task in tasks]:
            raise InputError(f"two task files are named {file.stem}; expected different names")
        own = named or [table.TABLE_1[file.stem][1]]
        text_metrics.check(own[0])
        tasks.append(generation.Task(file.stem, generation.read_rows(file), own))
    return tasks


def hold_dialogues(arguments: argparse.Namespace, evaluated: Mapping[str, Path]) -> None:
    """How long an instruction holds with every checkpoint: the dialogues, and the shares by turn, in `--output`."""
    dialogues = consistency.read_dialogues(arguments.dialogues)
    for name in ("output", "template"):
        if getattr(arguments, name) is None:
            raise InputError(f"--dialogues needs --{name}=…; found none")
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens={arguments.max_new_tokens} is below 1; expected 1 or more")
    settings = Settings(arguments.max_new_tokens, (), None, 0, 1, 1.0, arguments.batch_size)
    models = {name: TextModel(path) for name, path in evaluated.items()}
    templates = {name: consistency.check_template(model, arguments.template) for name, model in models.items()}
    _make_folder(arguments.output)
    found = {}
    for name in list(models):
        folder = arguments.output / name
        held = consistency.hold_with(models.pop(name), dialogues, templates[name], settings, folder)
        found[name] = consistency.shares(held)
        if not found[name]:
            raise InputError(
                f"{evaluated[name]}: no dialogue's first turn and {arguments.max_new_tokens} new tokens fit its "
                "positions; expected shorter ones"
            )
    content = {
        "checkpoints": {
            name: {"path": str(evaluated[name]), "turns": [share._asdict() for share in each]}
            for name, each in found.items()
        },
        "dialogues": len(dialogues),
        "settings": {name: getattr(arguments, name) for name in ("template", "max_new_tokens")},
    }
    files.write_json(arguments.output / f"{CONSISTENCY}.json", content)
    text = consistency.table(found)
    (arguments.output / f"{CONSISTENCY}.md").write_text(text)
    consistency.draw(found, arguments.output / f"{CONSISTENCY}.png")
    print(text, end="")


def run_harness(arguments: argparse.Namespace, evaluated: Mapping[str, Path]) -> None:
    """The harness's scores of every checkpoint, printed and written to `--output`."""
    try:
        from gqa.evaluation.harness import Harness, HarnessModel
    except ModuleNotFoundError as error:
        raise InputError(f"--harness needs the package {error.name}: pip install -e '.[eval]'") from None
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise InputError(f"--include_path={arguments.include_path} is no folder; expected one of task YAMLs")
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size={arguments.batch_size} is below 1; expected 1 or more")
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name}={value} is below {least}; expected {least} or more")
    tasks = arguments.harness.split(",")
    harness = Harness(tasks, arguments.include_path, arguments.num_fewshot, arguments.limit)
    models = {name: TextModel(path) for name, path in evaluated.items()}
    if arguments.output is not None:
        _make_folder(arguments.output)
    found = {}
    for name in list(models):
        found[name] = harness.run(HarnessModel(models.pop(name), arguments.batch_size))
        for task, scores in found[name].items():
            for score, value in scores.items():
                print(f"{name} {task} {score:30} {value:.4f}")
    if arguments.output is not None:
        files.write_json(arguments.output / SCORES, {"checkpoints": found})


def judge_preferences(arguments: argparse.Namespace, evaluated: Mapping[str, Path]) -> None:
    """Accuracy and calibration of every reward model, printed and written to `--output`."""
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size={arguments.batch_size} is below 1; expected 1 or more")
    if arguments.template is None:
        raise InputError(
            "--preferences needs --template, the one that the reward model was trained with, such as llama2"
        )
    if arguments.output is not None:
        _make_folder(arguments.output)
    asked = (arguments.preferences, arguments.template, arguments.batch_size)
    found = {name: preferences.evaluate(path, *asked) for name, path in evaluated.items()}
    tables = [preferences.table(one) for one in found.values()]
    if len(found) > 1:
        tables = [f"**{name}**\n\n{table}" for name, table in zip(found, tables, strict=True)]
    text = "\n\n".join(tables)
    print(text)
    if arguments.output is not None:
        preferences.draw(found, arguments.output / "calibration.png")
        (arguments.output / "preferences.md").write_text(text + "\n\n![Calibration](calibration.png)\n")
        files.write_json(arguments.output / "preferences.json", {"checkpoints": found})


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"--output={path} is a file; expected a folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output={path}: there is no folder {path.absolute().parent}")
    path.mkdir(exist_ok=True)
