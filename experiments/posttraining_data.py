"""python -m experiments.posttraining_data --output=DIR [--source=embedded_large]

Makes the data of the post-training example: "Document this function" with the function's code, answered with the first
line of its docstring.

| file | lines |
|---|---|
| `chats.jsonl` | conversations to fine-tune on |
| `preferences.jsonl` | pairs of responses, from the same functions |
| `prompts.jsonl` | prompts alone, of functions that neither of these has |
| `preferences_heldout.jsonl` `prompts_heldout.jsonl` | of files that none of these has, nor the shipped models |

The rule of preferences: the better of two responses with as many tokens is the one that mentions more words of the
function's code, each counted once, Python's own words left out. A pair is there where the difference is 2 or more, and
always twice: two functions' docstrings, each of which is the better one for its own function. So whatever looks at
responses alone, such as their length, one token or how well they are written, is right in exactly half of the pairs:
only who compares response and prompt can be right.
"""

import argparse
import json
import keyword
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gqa import command_line
from gqa.data.conversations import RATINGS
from gqa.errors import InputError

INSTRUCTION = "Document this function.\n\n"
TEMPLATE = "llama2"
VOCABULARY = Path("assets/vocabulary/python_4096.model")
CODE_CHARACTERS = 200  # of a function, cut between lines
PROMPT_TOKENS, RESPONSE_TOKENS = 96, 24  # the most of either
NUM_PROMPTS = 400  # functions kept for prompts.jsonl, at most a quarter
NUM_CHATS, NUM_PREFERENCES = 6000, 2600  # somewhat more than the example's steps read
LEAST_DIFFERENCE = 2  # mentioned words between the responses of a pair
SHIFTS = 2  # other docstrings of its length that each one is compared with

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # snake_case and CamelCase are several
_COMMON = frozenset("all and any are can for from has have not one self the this that with was will you".split())
_PASSED_OVER = _COMMON | {word.lower() for word in keyword.kwlist} | {"cls", "def"}


class Function(NamedTuple):
    """A prompt and its own response."""

    prompt: str
    response: str

    @property
    def messages(self) -> list[dict]:
        """The conversation."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]


def mentioned(prompt: str, response: str) -> int:
    """The rule: how many words of the prompt's code the response mentions."""
    return len(words(prompt.removeprefix(INSTRUCTION)) & words(response))


def words(text: str) -> set[str]:
    """The words of three letters or more in identifiers and sentences, in small letters, without Python's own."""
    return {word.lower() for word in _WORD.findall(text) if len(word) > 2} - _PASSED_OVER


def prompt_of(code: str) -> str | None:
    """The prompt for a function: its first lines, as many as `CODE_CHARACTERS` hold; `None` where not even one does."""
    kept, size = [], 0
    for line in code.split("\n"):
        size += len(line) + 1
        if size > CODE_CHARACTERS:
            break
        kept.append(line)
    return INSTRUCTION + "\n".join(kept).rstrip() if kept else None


def functions(rows: Iterable[dict], template, taken: set[str], skipped: Counter) -> Iterator[tuple[Function, int]]:
    """The usable rows of `gqa.data.docstrings`, each with its response's tokens; prompts are added to `taken`."""
    for row in rows:
        prompt = prompt_of(row["inputs"])
        if prompt is None or prompt in taken:
            skipped["first line too long" if prompt is None else "prompt seen before"] += 1
            continue
        function = Function(prompt, row["targets"])
        example = template.example(function.messages)
        num_response = int(example.trained.sum())
        if num_response > RESPONSE_TOKENS or len(example.tokens) - num_response > PROMPT_TOKENS:
            skipped["too many tokens"] += 1
            continue
        taken.add(prompt)
        yield function, num_response


def preferences(examples: Sequence[tuple[Function, int]]) -> list[dict]:
    """The pairs: two functions with docstrings of as many tokens, each of which mentions more of its own function.

    Of more than `NUM_PREFERENCES` some are drawn, both of each two functions.
    """
    by_length = defaultdict(list)
    for function, num_tokens in examples:
        by_length[num_tokens].append(function)
    found = []
    for _, group in sorted(by_length.items()):
        for shift in range(1, min(SHIFTS, (len(group) - 1) // 2) + 1):  # so that no two functions meet twice
            for place, first in enumerate(group):
                second = group[(place + shift) % len(group)]
                both = (_preference(first, second), _preference(second, first))
                if None not in both:
                    found.append(both)
    draw = random.Random(0)
    draw.shuffle(found)
    rows = [row for both in found[: NUM_PREFERENCES // 2] for row in both]
    draw.shuffle(rows)
    return rows


def _drawn(rows: Sequence, most: int) -> Sequence:
    """All rows, or `most` of them, in their order."""
    return [rows[place] for place in sorted(random.Random(0).sample(range(len(rows)), min(most, len(rows))))]


def _preference(function: Function, other: Function) -> dict | None:
    difference = mentioned(*function) - mentioned(function.prompt, other.response)
    if difference < LEAST_DIFFERENCE:
        return None
    rating = RATINGS[min(difference - LEAST_DIFFERENCE + 1, len(RATINGS) - 1)]
    return {"prompt": function.prompt, "chosen": function.response, "rejected": other.response, "rating": rating}


def make(source: str, vocabulary: Path, output: Path) -> dict:
    """Writes the files into the new folder `output`, and what they hold into `data.json` there, which it returns."""
    from gqa.data.docstrings import Docstrings
    from gqa.data.templates import Template
    from gqa.data.vocabulary import Vocabulary

    template = Template(TEMPLATE, Vocabulary(vocabulary, foreign=True))
    docstrings = Docstrings(source, modules=False)
    taken, skipped = set(), {split: Counter() for split in docstrings.splits}
    train, heldout = (
        list(functions(docstrings.rows(split), template, taken, skipped[split])) for split in docstrings.splits
    )
    num_prompts = min(NUM_PROMPTS, len(train) // 4)
    train, alone = train[num_prompts:], train[:num_prompts]
    files = {
        "chats": [{"messages": function.messages} for function, _ in _drawn(train, NUM_CHATS)],
        "preferences": preferences(train),
        "prompts": [{"prompt": function.prompt} for function, _ in alone],
        "preferences_heldout": preferences(heldout),
        "prompts_heldout": [function._asdict() for function, _ in heldout],
    }
    for name, rows in files.items():
        if not rows:
            raise InputError(f"source {source!r} gives no {name}; expected more Python functions with docstrings")
    about = {
        "source": source,
        "digests": {split: docstrings.digest(split) for split in docstrings.splits},
        "lines": {name: len(rows) for name, rows in files.items()},
        "skipped": {split: dict(counts + docstrings.skipped[split]) for split, counts in skipped.items()},
    }
    unfinished = output.with_name(f".{output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (unfinished / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (unfinished / "data.json").write_text(json.dumps(about, indent=2) + "\n")
    unfinished.rename(output)
    return about


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the files; must not exist")
    parser.add_argument(
        "--source", default="embedded_large", help="embedded, embedded_large (default), or a folder of Python files"
    )
    parser.add_argument(
        "--vocabulary", type=Path, default=VOCABULARY, help=f"by which tokens are counted (default: {VOCABULARY})"
    )
    arguments = command_line.parse_arguments(parser)
    if arguments.output.exists():
        raise InputError(f"--output={arguments.output} exists already; name a new folder")
    about = make(arguments.source, arguments.vocabulary, arguments.output)
    for name, count in about["lines"].items():
        print(f"{arguments.output / name}.jsonl: {count} lines")


if __name__ == "__main__":
    command_line.run(main)
