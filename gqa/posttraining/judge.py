"""Judges of conversations: a model that is asked and answers Yes or No, or a reward model (OpenBezoar)."""

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from gqa.data.instructions.parts import user
from gqa.data.templates import Template, Unusable
from gqa.decode.score import rewards, score
from gqa.models.llama import Llama
from gqa.posttraining import rollouts
from gqa.posttraining.config import InstructionsConfig
from gqa.posttraining.opening import check_reward, load_policy, load_reward, open_model

YES, NO = "Yes", "No"


def log_odds(
    model: Llama, template: Template, questions: Sequence[list[dict]], batch_size: int, name: str
) -> list[float | None]:
    """log p(Yes) - log p(No), in nats, as the model's whole response to each question, messages that end with a user's.

    `None` where the question and an answer exceed the model's positions, or the template cannot write them. `name` is
    of the progress bar.
    """
    rows: list[tuple[int, list[int], list[int]]] = []
    for number, messages in enumerate(questions):
        try:
            examples = [template.example([*messages, {"role": "assistant", "content": word}]) for word in (YES, NO)]
        except Unusable:
            continue
        if max(len(example.tokens) for example in examples) > model.config.max_position:
            continue
        for example in examples:
            start = int(np.argmax(example.trained))
            rows.append((number, example.tokens[:start].tolist(), example.tokens[start:].tolist()))
    rows.sort(key=lambda row: len(row[1]))  # stable: a question's Yes stays before its No
    found: list[float | None] = [None] * len(questions)
    B = 2 * batch_size
    with tqdm(total=len(rows) // 2, desc=name, unit="question", delay=1, dynamic_ncols=True) as bar:
        for first in range(0, len(rows), B):
            here = rows[first : first + B]
            filled = here + [here[-1]] * (B - len(here))  # a last batch of fewer rows would be a program of its own
            _, inputs, continuations = zip(*filled, strict=True)
            sums = [float(log_probs.sum()) for log_probs in score(model, inputs, continuations)]
            for place in range(0, len(here), 2):
                found[here[place][0]] = sums[place] - sums[place + 1]
            bar.update(len(here) // 2)
    return found


def question(messages: Sequence[dict]) -> list[dict]:
    """What a model is asked about a conversation."""
    system = f"System message:\n{messages[0]['content']}\n\n" if messages[0]["role"] == "system" else ""
    return [
        user(
            f"{system}Instruction:\n{messages[-2]['content']}\n\nResponse:\n{messages[-1]['content']}\n\n"
            "Is the instruction clear, and does the response carry it out correctly, completely and helpfully? "
            f"Answer {YES} or {NO}."
        )
    ]


class Judge:
    """The judge of a config; its checkpoint is checked at once and loaded when there is something to judge."""

    def __init__(self, config: InstructionsConfig):
        """Raises `InputError` for a checkpoint that cannot judge."""
        judge = config.judge
        self._config = config
        self._opened = open_model("judge", judge.checkpoint, judge.template, judge.vocabulary, config)
        if judge.kind == "reward":
            check_reward("judge", judge.checkpoint)

    def scores(self, conversations: Sequence[list[dict]]) -> list[float | None]:
        """The score of each conversation's response; `None` where the judge cannot read so much."""
        if not conversations:
            return []
        config, template = self._config, self._opened.template
        if config.judge.kind == "model":
            model = rollouts.unstacked(load_policy(config.judge.checkpoint, config))
            return log_odds(model, template, list(map(question, conversations)), config.batch_size, "judge")
        sequences = {}
        for number, messages in enumerate(conversations):
            with contextlib.suppress(Unusable):
                sequences[number] = template.example(messages).tokens.tolist()
        return self._rewards(sequences, len(conversations))

    def _rewards(self, sequences: Mapping[int, list[int]], total: int) -> list[float | None]:
        limit = self._opened.policy.config.max_position
        readable = [number for number, tokens in sequences.items() if len(tokens) <= limit]
        model = load_reward(self._config.judge.checkpoint, self._config)
        found: list[float | None] = [None] * total
        scores = rewards(model, [sequences[number] for number in readable], self._config.batch_size)
        for number, value in zip(readable, scores.tolist(), strict=True):
            found[number] = value
        return found
