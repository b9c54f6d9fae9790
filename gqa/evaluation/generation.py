"""What a checkpoint answers to the rows of a task, and its scores.

A row is a mapping with `inputs` and either `targets`, the right answer, or `answers`, a list of right ones.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from gqa import files
from gqa.decode import batches, buckets, journal
from gqa.errors import InputError, nearest
from gqa.evaluation import text_metrics
from gqa.evaluation.checkpoint_text import TextModel

PREDICTIONS = "predictions.jsonl"
JOURNAL = ".predictions.journal"  # tokens of what is done
_FIELDS = ("inputs", "targets", "answers")


class Task(NamedTuple):
    """Rows to answer and how the answers are scored."""

    name: str
    examples: Sequence[Mapping[str, Any]]
    metrics: Sequence[str]  # the first one's headline stands in the table


class Answers(NamedTuple):
    """What a checkpoint answered."""

    texts: list[str]  # one a row
    padding: float  # share of the positions read that were padding


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; other fields are kept.

    Raises `InputError` with file and line for the first line that is no row: a score without it would be another's.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected one with a JSON object a line")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(check_row(json.loads(line.decode("utf-8").rstrip("\r\n"))))
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: byte {error.start + 1} is no UTF-8") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: no JSON: {error.msg} at character {error.pos + 1}") from None
            except (InputError, RecursionError) as error:
                raise InputError(f"{path}:{number}: {error}") from None
            except ValueError as error:  # a number of thousands of digits
                raise InputError(f"{path}:{number}: no JSON: {error}") from None
    if not rows:
        raise InputError(f"{path} is empty; expected a JSON object a line")
    return rows


def check_row(row: Any) -> dict[str, Any]:
    """The row itself; `InputError` for one without text to read or without a right answer."""
    if not isinstance(row, Mapping):
        raise InputError(f"expected a JSON object, found {type(row).__name__}")
    if "inputs" not in row or not {"targets", "answers"} & row.keys():
        missing = "inputs" if "inputs" not in row else "targets"
        raise InputError(
            f"no field {missing!r}; expected inputs and targets (or answers), nearest: {nearest(missing, row)}"
        )
    for name in {"inputs", "targets"} & row.keys():
        if not isinstance(row[name], str):
            raise InputError(f"{name} is {type(row[name]).__name__}; expected text")
    if not row["inputs"].strip():
        raise InputError("inputs is empty; expected some text")
    answers = row.get("answers", [row.get("targets")])
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise InputError("answers is no list of texts; expected at least one")
    if not all(isinstance(answer, str) for answer in answers):
        raise InputError("answers holds something that is no text")
    return row


def right_answers(row: Mapping[str, Any]) -> list[str]:
    """All right answers of a row."""
    return list(row.get("answers") or [row["targets"]])


def answer(
    checkpoint: TextModel,
    examples: Iterable[Mapping[str, Any]],
    settings: batches.Settings,
    inputs_length: int | None,
    folder: Path,
) -> Answers:
    """Decodes an answer to every row into `predictions.jsonl` of `folder`; started again, it goes on.

    Args:
      checkpoint: what answers.
      examples: the rows.
      settings: how to decode; the checkpoint's own tokens end a text.
      inputs_length: tokens of an input that are read, the first ones; `None`: all.
      folder: made if it is not there.

    Raises `InputError` for rows that the model cannot read and a folder with another run's results.
    """
    examples = list(examples)
    settings = dataclasses.replace(settings, eos_ids=checkpoint.text.eos_ids)
    prompts = {}
    for number, row in enumerate(examples):
        try:
            tokens = _first(checkpoint.text.tokens(row["inputs"]), inputs_length, checkpoint.text.is_decoder)
            batches.check_prompt(checkpoint.config, tokens, settings.max_new_tokens)
        except InputError as error:
            raise InputError(f"row {number + 1}: {error}") from None
        prompts[number] = tokens
    identity = {
        "input": hashlib.sha256(json.dumps([row["inputs"] for row in examples]).encode()).hexdigest(),
        "checkpoint": checkpoint.identity,
        # Answers do not depend on the batch, which may turn out too large.
        "settings": repr(dataclasses.replace(settings, batch_size=1)),
        "inputs_length": inputs_length,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / JOURNAL, "ab+") as file:
        done = journal.open_journal(file, folder / JOURNAL, identity)
        waiting = {number: tokens for number, tokens in prompts.items() if number not in done}
        with tqdm(total=len(prompts), initial=len(done), unit="row", delay=1, dynamic_ncols=True) as bar:
            if waiting:
                for number, new in batches.generate_all(checkpoint.model, waiting, settings):
                    journal.append(file, number, new)
                    done[number] = new
                    bar.update()
        texts = [checkpoint.text.text(tokens, done[number]) for number, tokens in prompts.items()]
        rows = (dict(row) | {"prediction": text} for row, text in zip(examples, texts, strict=True))
        files.write_text(folder / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    # Without beams a decoder reads each prompt by itself.
    alone = checkpoint.text.is_decoder and settings.num_beams == 1
    batch_size = 1 if alone else min(settings.batch_size, len(prompts))
    return Answers(texts, buckets.padding_share([len(tokens) for tokens in prompts.values()], batch_size))


def scores(task: Task, texts: Sequence[str], samples: int, seed: int) -> dict[str, dict[str, float]]:
    """`{score: {value, low, high}}` of the task's metrics; arguments as of `text_metrics.evaluate`."""
    targets = [right_answers(row) for row in task.examples]
    found = {}
    for metric in task.metrics:
        for name, interval in text_metrics.evaluate(metric, targets, texts, samples=samples, seed=seed).items():
            found[name] = interval._asdict()
    return found


def _first(tokens: list[int], length: int | None, is_decoder: bool) -> list[int]:
    if length is None or len(tokens) <= length:
        return tokens
    return tokens[:length] if is_decoder else [*tokens[: length - 1], tokens[-1]]  # the last one is EOS
