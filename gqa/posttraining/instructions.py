"""Conversations that a parent model writes, by one of the prompt programs, and a judge accepts (OpenBezoar)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import IO

import jax
import numpy as np
from tqdm import tqdm

from gqa import files
from gqa.checkpoints.source import identity
from gqa.data.instructions.parts import Rejected, Request, read_seeds
from gqa.data.instructions.pipeline import Answered, Written, generate
from gqa.data.templates import Unusable
from gqa.decode.buckets import bucket
from gqa.decode.generate import check_lengths
from gqa.decode.journal import append, open_journal
from gqa.errors import InputError
from gqa.models.llama import Llama
from gqa.posttraining import rollouts
from gqa.posttraining.config import InstructionsConfig
from gqa.posttraining.instruction_report import Report
from gqa.posttraining.judge import Judge, log_odds
from gqa.posttraining.opening import Opened, load_policy, open_model
from gqa.training.signals import stopped_at_once


def run(config: InstructionsConfig, output: Path) -> None:
    """Writes `output` and its statistics; goes on where an interrupted run of the same config was.

    Raises `InputError` for what the config, the checkpoints and the seeds may not be; and where nothing is accepted,
    after the statistics, which say why.
    """
    try:
        import rapidfuzz  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("near-copies are found by the package rapidfuzz: pip install -e '.[clean]'") from None
    with stopped_at_once():
        _run(config, output)


def _run(config: InstructionsConfig, output: Path) -> None:
    opened = open_model("parent", config.parent, config.template, config.vocabulary, config)
    check_lengths(opened.policy.config, config.inputs_length, config.new_tokens)
    judge = Judge(config)
    seeds = read_seeds(config.seeds)
    requests = config.program.requests(seeds, Random(config.seed))
    journal_path = output.with_name(f".{output.name}.partial")
    with open(journal_path, "ab+") as journal:
        parent = Parent(
            config, opened, journal, open_journal(journal, journal_path, _identity(config, opened, requests))
        )
        outcome = generate(config.program, requests, seeds, parent.write, parent.says_yes)
    del parent  # one model in memory at a time
    scores = judge.scores([answered.messages for answered in outcome.answered])
    report = Report(config, outcome, scores, opened.template.vocabulary)
    report.write(output)
    print(report.table(), end="")
    if not report.accepted:
        raise InputError(f"nothing was accepted: {report.summary()}; {output.with_suffix('.md')} counts them")
    text = "".join(_line(config, answered, score) for answered, score in report.accepted)
    files.write_text(output, text)
    journal_path.unlink()
    print(f"wrote {output}: {len(report.accepted)} conversations")


class Parent:
    """The model that writes, by the engine: what it has written is in the journal, and is not written again."""

    def __init__(self, config: InstructionsConfig, opened: Opened, journal: IO[bytes], done: dict[int, list[int]]):
        self._config, self._opened, self._journal, self._done = config, opened, journal, done
        self._loaded: list[Llama] = []

    def write(self, asked: Mapping[int, list[dict]]) -> dict[int, Written | Rejected]:
        """The answer to each message list, by its number."""
        template, config = self._opened.template, self._config
        prompts, rejected = {}, dict.fromkeys(asked, Rejected("prompt too long"))
        for number, messages in asked.items():
            try:
                prompts[number] = template.prompt(messages)
            except Unusable as unusable:  # of what the parent wrote before
                rejected[number] = Rejected(unusable.reason)
        fitting = [number for number, tokens in prompts.items() if len(tokens) <= config.inputs_length]
        # A batch is a function of the prompts alone: what a kill took is drawn again with the same rows beside it.
        fitting.sort(key=lambda number: (len(prompts[number]), number))
        left = sum(number not in self._done for number in fitting)
        with tqdm(
            total=len(fitting), initial=len(fitting) - left, desc="write", unit="text", delay=1, dynamic_ncols=True
        ) as bar:
            for first in range(0, len(fitting), config.batch_size):
                numbers = fitting[first : first + config.batch_size]
                if not all(number in self._done for number in numbers):
                    bar.update(self._draw({number: prompts[number] for number in numbers}))
        return {
            number: self._written(self._done[number]) if number in self._done else rejected[number] for number in asked
        }

    def _draw(self, prompts: Mapping[int, list[int]]) -> int:
        """Draws a batch, and writes down what is not there already: how many."""
        config, B = self._config, self._config.batch_size
        drawn = rollouts.draw(
            self._model(),
            list(prompts.values()),
            np.pad(np.array(list(prompts), np.int32), (0, B - len(prompts))),
            shape=(B, min(bucket(max(map(len, prompts.values()))), config.inputs_length), config.new_tokens),
            eos_ids=self._opened.eos_ids,
            temperature=config.temperature,
            seed=config.seed,
        )
        tokens_BN, counts_B = jax.device_get((drawn.response_BN, drawn.counts_B))
        new = 0
        for number, tokens, count in zip(prompts, tokens_BN, counts_B, strict=False):
            if number not in self._done:
                self._done[number] = tokens[:count].tolist()
                append(self._journal, number, self._done[number])
                new += 1
        return new

    def says_yes(self, questions: Sequence[list[dict]]) -> list[bool | None]:
        """Whether Yes is a more likely answer than No; `None` where the question is too long."""
        if not questions:
            return []
        odds = log_odds(self._model(), self._opened.template, questions, self._config.batch_size, "compare")
        return [None if value is None else value > 0 for value in odds]

    def _written(self, tokens: Sequence[int]) -> Written:
        ended = tokens[-1] in self._opened.eos_ids
        return Written(self._opened.template.response(tokens[:-1] if ended else tokens), ended)

    def _model(self) -> Llama:
        if not self._loaded:
            self._loaded.append(rollouts.unstacked(load_policy(self._config.parent, self._config)))
        return self._loaded[0]


def _line(config: InstructionsConfig, answered: Answered, score: float) -> str:
    request = answered.candidate.request
    line = {
        "messages": answered.messages,
        "program": config.program_name,
        "method": request.method,
        "seeds": [seed.line for seed in request.seeds],
        "score": score,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _identity(config: InstructionsConfig, opened: Opened, requests: Sequence[Request]) -> dict:
    """What the texts are a function of; not the filters, the judge or the batch, which may turn out otherwise."""
    asked = json.dumps([(request.messages, request.seeds, request.method) for request in requests])
    return {
        "seeds": hashlib.sha256(asked.encode()).hexdigest(),
        "parent": identity(opened.policy.weight_files),
        "vocabulary": opened.template.vocabulary.sha256,
        "settings": [
            config.program_name,
            config.template,
            config.inputs_length,
            config.new_tokens,
            config.temperature,
            config.seed,
            config.dtype,
        ],
    }
