"""A round of rejection sampling: draw, score, keep the best of all rounds (Llama 2 §3.2.3)."""

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from gqa import files
from gqa.checkpoints.source import identity
from gqa.data.conversations import lines, of_line
from gqa.data.templates import Unusable, check
from gqa.decode.buckets import padded
from gqa.decode.journal import append, open_journal
from gqa.errors import InputError
from gqa.posttraining import rollouts, statistics
from gqa.posttraining.config import RejectionConfig
from gqa.posttraining.opening import Opened, load_policy, load_reward, open_all, prompt_length
from gqa.posttraining.prompts import Prompt, key_of, read_prompts
from gqa.training.signals import stopped_at_once


class Kept(NamedTuple):
    """A response that may be the best one of its prompt: a line of the output."""

    messages: list[dict]  # the prompt's, and the response
    score: float
    round: int
    temperature: float | None

    @property
    def key(self) -> str:
        """What the prompt is told apart by."""
        return key_of(self.messages[:-1])


def merge(rounds: Sequence[Sequence[Kept]]) -> list[Kept]:
    """The best of each prompt, in the order in which prompts come; of equals the first."""
    best: dict[str, Kept] = {}
    for kept in (kept for each in rounds for kept in each):
        if kept.key not in best or kept.score > best[kept.key].score:
            best[kept.key] = kept
    return list(best.values())


def read_round(path: str | Path) -> list[Kept]:
    """The lines of a former round's output; `InputError`, with the line's number, for what is none."""
    found = []
    for number, row in lines(path):
        with of_line(path, number):
            check(row.get("messages"))
            if row["messages"][-1]["role"] != "assistant":
                raise InputError("the last message is a user's; expected a response")
            if type(row.get("round")) is not int or not isinstance(row.get("score"), float | int):
                raise InputError("there is no round and score; expected a line that gqa.rejection_sampling wrote")
            found.append(Kept(row["messages"], float(row["score"]), row["round"], row.get("temperature")))
    return found


def run(config: RejectionConfig, output: Path) -> None:
    """Writes `output` and its statistics; goes on where an interrupted run of the same config was.

    Raises `InputError` for what the config, the checkpoints and the prompts may not be, and where no sample is usable.
    """
    with stopped_at_once():
        _run(config, output)


def _run(config: RejectionConfig, output: Path) -> None:
    opened = open_all(config, {"reward": config.reward, "safety": config.safety})
    prompts = read_prompts(config.prompts, opened.template, config.inputs_length)
    former, former_sequences = _read_former(config.former, opened)
    length = prompt_length(prompts, config, opened)
    samples = _draw_all(config, opened, prompts, length, output)

    # Candidates are scored as the text that is written; what cannot be written, as it was drawn, with an end: reward
    # models have only read responses that end.
    rows, sequences, candidates = [], [], []
    for number, (prompt, temperature, tokens) in enumerate(_numbered(config, prompts, samples)):
        messages, whole = _finished(opened, prompt, tokens), None
        if messages is not None:
            with contextlib.suppress(Unusable):  # the text spells a special token of the tokenizer's own template
                whole = opened.template.example(messages).tokens.tolist()
                candidates.append((number, messages, temperature))
        if whole is None:
            whole = [*prompt.tokens, *tokens, *opened.ending[tokens[-1] in opened.eos_ids :]]
        rows.append(prompt.is_safety)
        sequences.append(whole)
    is_safety = {key_of(prompt.messages): prompt.is_safety for prompt in prompts}
    rows += [is_safety.get(kept.key, False) for kept in former]
    sequences += former_sequences
    scores = _score_all(config, sequences, rows, max(map(len, sequences)))

    this_round = 1 + max((kept.round for kept in former), default=0)
    # Scored anew: a reward model of this round says nothing about scores of another one.
    earlier = [kept._replace(score=score) for kept, score in zip(former, scores[len(samples) :], strict=True)]
    now = [Kept(messages, scores[number], this_round, temperature) for number, messages, temperature in candidates]
    kept = _ordered(merge([earlier, now]), prompts)
    if not kept:
        raise InputError(
            f"none of {len(samples)} samples is a whole response within new_tokens={config.new_tokens}; expected a "
            "policy that ends its responses, or more new_tokens"
        )
    shape = (len(config.temperatures), len(prompts), config.samples)
    by_temperature = dict(
        zip(
            config.temperatures,
            map(statistics.curves, np.array(scores[: len(samples)]).reshape(shape)),
            strict=True,
        )
    )
    _write_statistics(by_temperature, config, len(prompts), output)
    text = "".join(json.dumps(line._asdict(), ensure_ascii=False) + "\n" for line in kept)
    files.write_text(output, text)
    _journal_path(output).unlink()
    keys = {line.key for line in kept}
    without = sum(key_of(prompt.messages) not in keys for prompt in prompts)
    print(statistics.table(by_temperature), end="")
    earlier_rounds = sum(line.round < this_round for line in kept)
    print(
        f"wrote {output}: round {this_round}, {len(kept)} conversations, {earlier_rounds} of them of former rounds, "
        f"mean score {np.mean([line.score for line in kept]):.3f}; {without} prompts without a whole response"
    )


def _read_former(path: str | None, opened: Opened) -> tuple[list[Kept], list[list[int]]]:
    """The lines of the former round that the template can write, and their tokens."""
    kept, sequences, left_out = [], [], 0
    for line in [] if path is None else read_round(path):
        try:
            sequences.append(opened.template.example(line.messages).tokens.tolist())
            kept.append(line)
        except Unusable:
            left_out += 1
    if left_out:
        print(f"{path}: {left_out} lines spell a special token and are left out", file=sys.stderr)
    return kept, sequences


def _numbered(config: RejectionConfig, prompts: Sequence[Prompt], samples: Mapping[int, list[int]]) -> Iterator[tuple]:
    """Every sample in the order of its number: by temperature, prompt and sample."""
    N = config.samples
    for number in range(len(samples)):
        temperature, place = divmod(number, len(prompts) * N)
        yield prompts[place // N], config.temperatures[temperature], samples[number]


def _draw_all(
    config: RejectionConfig, opened: Opened, prompts: Sequence[Prompt], length: int, output: Path
) -> dict[int, list[int]]:
    """Tokens of every sample by number: from the journal, and drawn for the rest."""
    N, count = config.samples, len(prompts)
    at_once = max(1, config.batch_size // N)  # prompts, each read once for its samples
    most = min(N, config.batch_size)  # samples of each
    total = len(config.temperatures) * count * N
    with open(_journal_path(output), "ab+") as journal:
        done = open_journal(journal, _journal_path(output), _identity(config, opened))
        policy = None
        bar = tqdm(total=total, initial=len(done), unit="sample", desc="draw", delay=1, dynamic_ncols=True)
        with bar:
            for place, temperature in enumerate(config.temperatures):
                for first, sample in itertools.product(range(0, count, at_once), range(0, N, most)):
                    here = prompts[first : first + at_once]
                    start = (place * count + first) * N
                    numbers = range(start + sample, start + min(sample + at_once * most, len(here) * N))
                    if all(number in done for number in numbers):
                        continue
                    if policy is None:
                        policy = rollouts.unstacked(load_policy(config.policy, config))
                    drawn = rollouts.draw(
                        policy,
                        [prompt.tokens for prompt in here],
                        start + sample + np.arange(at_once * most),
                        shape=(at_once, length, config.new_tokens),
                        eos_ids=opened.eos_ids,
                        temperature=temperature,
                        seed=config.seed,
                    )
                    tokens_BN, counts_B = jax.device_get((drawn.response_BN, drawn.counts_B))
                    for number, tokens, tokens_count in zip(numbers, tokens_BN, counts_B, strict=False):
                        if number not in done:
                            done[number] = tokens[:tokens_count].tolist()
                            append(journal, number, done[number])
                            bar.update()
    return done


def _score_all(
    config: RejectionConfig, sequences: Sequence[list[int]], is_safety: Sequence[bool], length: int
) -> list[float]:
    """The scores of sequences of up to `length` tokens, a former round's longer prompts among them."""
    reward, safety = load_reward(config.reward, config), load_reward(config.safety, config)
    B, scores = config.batch_size, []
    with tqdm(total=len(sequences), unit="sample", desc="score", delay=1, dynamic_ncols=True) as bar:
        for first in range(0, len(sequences), B):
            here = sequences[first : first + B]
            tokens_BT, lengths_B = padded(here, B, length)
            is_safety_B = np.zeros(B, bool)
            is_safety_B[: len(here)] = is_safety[first : first + B]
            found = rollouts.score(reward, safety, tokens_BT, lengths_B, is_safety_B, gate=config.safety_gate, size=B)
            scores += np.asarray(found)[: len(here)].tolist()
            bar.update(len(here))
    return scores


def _finished(opened: Opened, prompt: Prompt, tokens: Sequence[int]) -> list[dict] | None:
    """The conversation with a sample that ended by itself and says something, else `None`.

    What was cut off would be learnt as a whole response.
    """
    if tokens[-1] not in opened.eos_ids:
        return None
    text = opened.template.response(tokens[:-1])
    if not text:
        return None
    return [*prompt.messages, {"role": "assistant", "content": text}]


def _ordered(kept: Sequence[Kept], prompts: Sequence[Prompt]) -> list[Kept]:
    """Prompts of this round as they are in their file, then those of former rounds alone."""
    places = {key_of(prompt.messages): place for place, prompt in enumerate(prompts)}
    return sorted(kept, key=lambda line: places.get(line.key, len(places)))


def _identity(config: RejectionConfig, opened: Opened) -> dict:
    """What the samples are a function of; not the batch, which may turn out too large."""
    return {
        "prompts": hashlib.sha256(Path(config.prompts).read_bytes()).hexdigest(),
        "policy": identity(opened.policy.weight_files),
        "vocabulary": opened.template.vocabulary.sha256,
        "settings": [
            config.template,
            config.inputs_length,
            config.new_tokens,
            list(config.temperatures),
            config.samples,
            config.seed,
            config.dtype,
        ],
    }


def _journal_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def _write_statistics(by_temperature: statistics.Curves, config: RejectionConfig, prompts: int, output: Path) -> None:
    content = {
        "prompts": prompts,
        "policy": config.policy,
        "reward": config.reward,
        "curves": [{"temperature": temperature, **curve} for temperature, curve in by_temperature.items()],
    }
    files.write_json(output.with_suffix(".json"), content)
    files.write_text(output.with_suffix(".md"), statistics.table(by_temperature))
    with files.whole(output.with_suffix(".png")) as picture:
        statistics.draw(by_temperature, picture)
