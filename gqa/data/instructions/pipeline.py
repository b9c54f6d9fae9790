"""From requests to conversations that wait for a judge, each step counted; the parent is a function."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm

from gqa.data.instructions.parts import Candidate, Program, Rejected, Request, Seed, plain


class Written(NamedTuple):
    """What a parent answers."""

    text: str
    ended: bool  # False: cut off at the most tokens it may have


Write = Callable[[Mapping[int, list[dict]]], Mapping[int, Written | Rejected]]  # messages by number -> answers
SaysYes = Callable[[Sequence[list[dict]]], Sequence[bool | None]]  # questions -> answers; None: too long to ask


class Answered(NamedTuple):
    """A conversation that passed every filter."""

    candidate: Candidate
    messages: list[dict]  # the prompt's and the response


class Outcome(NamedTuple):
    """What a program came to, before the judge."""

    requests: int  # calls for instructions; without such calls, seeds
    instructions: int  # that the parent wrote, or that the seeds have
    candidates: int  # of these, what it was asked to respond to
    rejected: Counter  # by reason, in the order in which the steps come
    answered: list[Answered]


def generate(
    program: Program, requests: Sequence[Request], seeds: Sequence[Seed], write: Write, same: SaysYes
) -> Outcome:
    """Runs a program.

    Args:
      program: which one.
      requests: what it asks.
      seeds: which instructions may not be near-copies of.
      write: asks the parent. Instructions are numbered from 0 by request, responses go on from there with
        `per_request` numbers for each request: a number's meaning does not depend on what the filters let through.
      same: whether the parent answers Yes to the question if two prompts ask for the same.
    """
    rejected: Counter = Counter()
    answers = write({number: request.messages for number, request in enumerate(requests) if request.messages})
    parsed: dict[int, Candidate] = {}
    instructions = 0
    for number, request in enumerate(requests):
        answer = answers[number] if request.messages else Written("", True)
        place = len(requests) + number * program.per_request
        for found in [answer] if isinstance(answer, Rejected) else program.parse(request, answer.text):
            if isinstance(found, Rejected):
                rejected[found.reason] += 1
            else:
                parsed[place] = found
                place += 1
                instructions += 1
    if program.writes_instructions:
        parsed = _without_copies(program, parsed, seeds, rejected)
    parsed = _without_same(parsed, same, rejected)
    answered = []
    responses = write({number: candidate.asked for number, candidate in parsed.items()})
    for number, candidate in parsed.items():
        found = _finished(program, candidate, responses[number])
        if isinstance(found, Rejected):
            rejected[found.reason] += 1
        else:
            answered.append(found)
    return Outcome(len(requests), instructions, len(parsed), rejected, answered)


def _without_copies(
    program: Program, parsed: Mapping[int, Candidate], seeds: Sequence[Seed], rejected: Counter
) -> dict[int, Candidate]:
    others, before, kept = [plain(seed.text) for seed in seeds], set(), {}
    for number, candidate in tqdm(parsed.items(), desc="compare", unit="instruction", delay=1, dynamic_ncols=True):
        text = plain(candidate.instruction)
        if text in before:
            rejected["written before"] += 1
        elif program.near_copies.one_of(text, others):
            rejected["near-copy of a seed"] += 1
        else:
            kept[number] = candidate
        before.add(text)
    return kept


def _without_same(parsed: Mapping[int, Candidate], same: SaysYes, rejected: Counter) -> dict[int, Candidate]:
    asked = [number for number, candidate in parsed.items() if candidate.same is not None]
    verdicts = dict(zip(asked, same([parsed[number].same for number in asked]) if asked else (), strict=True))
    kept = {}
    for number, candidate in parsed.items():
        verdict = verdicts.get(number, False)
        if verdict is None:
            rejected["too long to compare"] += 1
        elif verdict:
            rejected["asks for the same as its seed"] += 1
        else:
            kept[number] = candidate
    return kept


def _finished(program: Program, candidate: Candidate, written: Written | Rejected) -> Answered | Rejected:
    if isinstance(written, Rejected):
        return written
    if not written.ended:  # would be learnt as a whole response
        return Rejected("response cut off")
    if not written.text.strip():
        return Rejected("empty response")
    reason = program.refusal(candidate, written.text)
    if reason is not None:
        return Rejected(reason)
    return Answered(candidate, [*candidate.prompt, {"role": "assistant", "content": written.text}])
