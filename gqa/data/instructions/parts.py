"""What the prompt programs share: seeds, requests, candidates; tags; near-copies."""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

from tqdm import tqdm

from gqa.data.conversations import lines, messages_of, of_line
from gqa.data.templates import Turn, Unusable, check
from gqa.errors import InputError


class Rejected(NamedTuple):
    """What came to nothing."""

    reason: str  # in a few words, to count by


class Seed(NamedTuple):
    """What a person asks, from a line of a file."""

    line: int
    text: str
    answer: str | None
    submixture: str | None  # of which collection it is a part (Orca)


class Request(NamedTuple):
    """A call of the parent."""

    seeds: tuple[Seed, ...]  # that it is made of
    method: str  # in which of the program's ways
    messages: list[dict] | None  # what the parent is asked; None: nothing, the seed's own instruction stands


class Candidate(NamedTuple):
    """An instruction that waits for its response."""

    request: Request
    prompt: list[dict]  # with what the conversation begins: a system message or not, and the instruction
    asked: list[dict]  # what the parent responds to
    same: list[dict] | None  # the question whether nothing was added to the seed, to be answered; None: there is none

    @property
    def instruction(self) -> str:
        """What the user says."""
        return self.prompt[-1]["content"]


def plain(text: str) -> str:
    """A text as it counts where two are compared: in lower case, with one blank between words."""
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class NearCopies:
    """When a text is a near-copy of another: as similar *and* as few edits away as this (OpenBezoar: 0.6 and 9).

    Either alone would go too far: a prompt that was deepened still holds most of its seed, and any two short prompts
    are few edits apart.
    """

    similarity: float  # least ratio: twice the longest common subsequence over both lengths
    distance: int  # most insertions, deletions and replacements of a character (Levenshtein)

    def __post_init__(self):
        if not 0 <= self.similarity <= 1:
            raise InputError(f"near_copies.similarity={self.similarity}; expected a ratio in [0, 1], such as 0.6")
        if self.distance < 0:
            raise InputError(f"near_copies.distance={self.distance}; expected 0 or more, such as 9")

    def one_of(self, text: str, others: Sequence[str]) -> bool:
        """Whether `text` is a near-copy of one of the others, all of them as `plain` gives them."""
        from rapidfuzz import process
        from rapidfuzz.distance import Indel, Levenshtein

        close = process.extract_iter(text, others, scorer=Levenshtein.distance, score_cutoff=self.distance)
        return any(Indel.normalized_similarity(text, other) >= self.similarity for other, _, _ in close)


class Program(Protocol):
    """A prompt program."""

    near_copies: NearCopies

    @property
    def per_request(self) -> int:
        """Most candidates of a request."""

    @property
    def writes_instructions(self) -> bool:
        """Whether instructions are the parent's, and so may be copies."""

    def requests(self, seeds: Sequence[Seed], rng: Random) -> list[Request]:
        """What the parent is asked."""

    def parse(self, request: Request, text: str) -> list[Candidate | Rejected]:
        """What the parent's answer holds, at most `per_request` candidates first."""

    def refusal(self, candidate: Candidate, response: str) -> str | None:
        """Why a response is none; `None`: it is one."""


def user(text: str) -> dict:
    """A user's message."""
    return {"role": "user", "content": text}


def read_seeds(path: str | Path) -> list[Seed]:
    """The seeds of a JSONL file: of every line its first user's message and, where there is one, the answer to it.

    A line is a conversation, a preference, `{"instruction", "input", "output"}` or `{"prompt": text or messages}`, with
    `"submixture"` or not. Lines with an empty response are left out, with a line on stderr.

    Raises `InputError`, with the line's number, for another, and for a file without usable lines.
    """
    seeds, skipped = [], Counter()
    for number, row in lines(path):
        try:
            with of_line(path, number):
                seeds.append(_seed(number, row))
        except Unusable as unusable:
            skipped[unusable.reason] += 1
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if not seeds:
        found = f"has no usable seeds ({left_out})" if left_out else "is empty"
        raise InputError(f"{path} {found}; expected seeds, a JSON object a line")
    if left_out:
        tqdm.write(f"{path}: left out {left_out}", file=sys.stderr)
    return seeds


def _seed(number: int, row: dict) -> Seed:
    if "prompt" in row and "chosen" not in row:
        prompt = row["prompt"]
        messages = [user(prompt)] if isinstance(prompt, str) else prompt
    else:
        messages = messages_of(row)
    check(messages)
    turns = [message for message in messages if message["role"] != "system"]
    text = Turn(turns[0]["content"], turns[0].get("input") or None, None, False).text.strip()
    if not text:
        raise InputError("the instruction is empty; expected some text")
    submixture = row.get("submixture")
    if submixture is not None and not isinstance(submixture, str):
        raise InputError(f"submixture is a {type(submixture).__name__}; expected a text")
    return Seed(number, text, turns[1]["content"].strip() if len(turns) > 1 else None, submixture)


def tagged(text: str, tag: str) -> Iterator[str | Rejected]:
    """What stands between `<tag>` and `</tag>`, in order; for what is not closed, not opened or empty the reason."""
    start, end = f"<{tag}>", f"</{tag}>"
    opened, found = None, False
    for mark in re.finditer(f"{re.escape(start)}|{re.escape(end)}", text):
        found = True
        if mark.group() == start:
            if opened is not None:
                yield Rejected(f"unclosed <{tag}>")
            opened = mark.end()
        elif opened is None:
            yield Rejected(f"unopened </{tag}>")
        else:
            inner = text[opened : mark.start()].strip()
            yield inner or Rejected(f"empty <{tag}>")
            opened = None
    if opened is not None:
        yield Rejected(f"unclosed <{tag}>")
    elif not found:
        yield Rejected(f"no <{tag}>")
