"""Prompts of a JSONL file, in tokens."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gqa.data.conversations import fraction_of, lines, of_line, prompt_of
from gqa.data.templates import Template, Unusable
from gqa.errors import InputError


class Prompt(NamedTuple):
    """What a policy responds to."""

    line: int  # of the file
    messages: list[dict]
    tokens: list[int]
    is_safety: bool  # tagged as one that the safety model scores
    fraction: float  # by which prompts are held out, a hash


def read_prompts(path: str | Path, template: Template, max_tokens: int) -> list[Prompt]:
    """The prompts of a file, each once; those of more than `max_tokens` and conversations with an empty response before
    the last user's message are left out, with a line on stderr.

    A preference's prompt is held out here where `gqa.data.conversations` holds it out from SFT and a reward model.

    Raises `InputError`, with the line's number, for an empty prompt and for a line that is none, and where no prompt is
    left.
    """
    prompts: dict[str, Prompt] = {}
    too_long, repeated, skipped = [], 0, Counter()
    for number, row in lines(path):
        try:
            with of_line(path, number):
                messages = prompt_of(row)
                if not isinstance(row.get("safety", False), bool):
                    raise InputError(f"safety is {row['safety']!r}; expected true or false")
                tokens = template.prompt(messages)
        except Unusable as unusable:
            skipped[unusable.reason] += 1
            continue
        if len(tokens) > max_tokens:
            too_long.append(f"line {number} has {len(tokens)}")
            continue
        key = key_of(messages)
        repeated += key in prompts
        fraction = fraction_of(row.get("prompt", messages))
        prompts.setdefault(key, Prompt(number, messages, tokens, row.get("safety", False), fraction))
    longer = f"{path}: {len(too_long)} prompts have more than inputs_length={max_tokens} tokens, the first:"
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if not prompts:
        if too_long:
            raise InputError(f"{longer} {too_long[0]}; none is left")
        found = f"has no usable prompts ({left_out})" if left_out else "is empty"
        raise InputError(f"{path} {found}; expected prompts")
    if left_out:
        tqdm.write(f"{path}: left out {left_out}", file=sys.stderr)
    if too_long:
        tqdm.write(f"{longer} {too_long[0]}; they are left out", file=sys.stderr)
    if repeated:
        tqdm.write(f"{path}: {repeated} prompts are there before; they are left out", file=sys.stderr)
    return list(prompts.values())


def key_of(messages: Sequence[dict]) -> str:
    """What tells prompts apart."""
    return json.dumps(messages, sort_keys=True)


def held_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and the `count` that are held out; of prompts that begin alike, none is on both sides."""
    if 2 * count > len(prompts):
        raise InputError(f"train.heldout={count} of {len(prompts)} prompts; expected at most half: {len(prompts) // 2}")
    ordered = sorted(prompts, key=lambda prompt: (prompt.fraction, prompt.line))
    kept, left = (
        ordered[:count],
        [prompt for prompt in ordered[count:] if prompt.fraction > ordered[count - 1].fraction],
    )
    if not left:
        raise InputError(f"train.heldout={count} of {len(prompts)} prompts leaves none: they all begin alike")
    return sorted(left, key=lambda prompt: prompt.line), kept
