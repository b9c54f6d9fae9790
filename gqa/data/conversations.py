"""Conversations and preferences of JSONL files as training examples.

| task | a line of the file |
|---|---|
| `sft` | `{"messages": […]}`; or `{"instruction", "output"}` `"input"` and `"system"` or not; or a preference |
| `preferences` | `{"prompt": text or messages, "chosen": text, "rejected": text}`, with or without `"rating"` |

What no line may be (roles, missing fields, ratings outside of the scale) is refused with the line's number. What there
is nothing to learn from (an empty response, a prompt longer than a row, chosen equal to rejected, a text that spells a
special token of the tokenizer's own template) is left out, and counted by reason.

What a chunk of either holds: `gqa.data.packing`.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gqa.data.corpus import HELDOUT_FRACTION, SPLITS
from gqa.data.examples import TRAINED
from gqa.data.templates import Example, Template, Unusable, check
from gqa.errors import InputError, nearest

# Llama 2 §3.2.1, from the least distinct; a rating is its place here, 0 where a line has none.
RATINGS = ("negligibly better / unsure", "slightly better", "better", "significantly better")


def lines(path: str | Path) -> Iterator[tuple[int, dict]]:
    """`(number of the line, object)` of a JSONL file; blank lines are passed over."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected conversations, a JSON object a line")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path} line {number} is not JSON: {line[:60]!r}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is a {type(row).__name__}; expected an object")
            yield number, row


def messages_of(row: Mapping) -> list[dict]:
    """The messages of a line of `sft`; `InputError` where it has neither messages nor instruction and output.

    A line of `preferences` is a conversation with the chosen response: what a reference is tuned on (DPO §4).
    """
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise InputError(f"messages is a {type(row['messages']).__name__}; expected a list of {{role, content}}")
        return row["messages"]
    if _is_preference(row):
        return [*_read_preference({"rejected": "", **row})[0], {"role": "assistant", "content": row["chosen"]}]
    for name in ("instruction", "output"):
        if name not in row:
            found = ", ".join(map(str, row)) or "nothing"
            raise InputError(f"there is no {name!r} among {found}; expected messages, or instruction and output")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") not in (None, "") else []
    user = {"role": "user", "content": row["instruction"]}
    if row.get("input") not in (None, ""):
        user["input"] = row["input"]
    return [*messages, user, {"role": "assistant", "content": row["output"]}]


def pair_of(row: Mapping) -> tuple[list[dict], list[dict], int]:
    """The messages with the chosen and with the rejected response of a line of `preferences`, and its rating.

    Raises `InputError` for missing fields, ratings outside of the scale and prompts that are no messages, `Unusable`
    for equal responses.
    """
    messages, rating = _read_preference(row)
    if row["chosen"].strip() == row["rejected"].strip():
        raise Unusable("chosen equal to rejected", "chosen and rejected are the same response")
    check(messages)
    chosen, rejected = ([*messages, {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected"))
    return chosen, rejected, rating


def _is_preference(row: Mapping) -> bool:
    """Whether a line of `sft` is one of `preferences`, with or without its rejected response."""
    return "prompt" in row and "chosen" in row


def _read_preference(row: Mapping) -> tuple[list[dict], int]:
    """The messages of the prompt of a line of `preferences`, and its rating's place on the scale; 0: it has none."""
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            found = ", ".join(map(str, row)) or "nothing"
            raise InputError(f"there is no {name!r} among {found}; expected prompt, chosen and rejected")
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list):
        raise InputError(f"prompt is a {type(prompt).__name__}; expected a text or messages")
    rating = row.get("rating")
    if rating is not None and rating not in RATINGS:
        found = nearest(str(rating), RATINGS)
        raise InputError(f"rating {rating!r} is not on the scale {', '.join(map(repr, RATINGS))}; nearest: {found!r}")
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], str):
            raise InputError(f"{name} is a {type(row[name]).__name__}; expected a text")
    return messages, 0 if rating is None else RATINGS.index(rating) + 1


def prompt_of(row: Mapping) -> list[dict]:
    """The messages of a line up to the last user's: of a prompt alone, of a preference or of a conversation.

    Raises `InputError` for a line that is none of these, and for an empty prompt.
    """
    if "prompt" in row:
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    elif "messages" in row or "instruction" in row:
        messages = messages_of({"output": "", **row})
    else:
        found = ", ".join(map(str, row)) or "nothing"
        raise InputError(f"there is no 'prompt' among {found}; expected prompt, messages or instruction")
    if isinstance(messages, Sequence) and messages and isinstance(messages[-1], Mapping):
        messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    check(messages)
    if not messages[-1]["content"].strip():
        raise InputError("the prompt is empty; expected some text")
    return messages


def fraction_of(prompt) -> float:
    """A number in [0, 1) for what a user asks first (text or messages): those of the least are held out.

    Neither a system message nor later turns decide it: conversations that begin alike are on one side.
    """
    if isinstance(prompt, list):
        users = (message for message in prompt if isinstance(message, Mapping) and message.get("role") == "user")
        first = next(users, {})
        content, given = first.get("content"), first.get("input")
        prompt = f"{content}\n\n{given}" if given else content
    text = json.dumps(prompt, sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def last_turn_only(messages: Sequence[dict]) -> list[dict]:
    """The messages with no loss on any response but the last."""
    return [
        {**message, "train": False} if message.get("role") == "assistant" and number < len(messages) - 1 else message
        for number, message in enumerate(messages)
    ]


def cut(example: Example, max_tokens: int) -> Example:
    """The first `max_tokens`; `Unusable` where none of them is trained: the prompt alone is longer.

    A cut response has no EOS: the model does not learn to stop in the middle.
    """
    kept = Example(example.tokens[:max_tokens], example.trained[:max_tokens])
    if not kept.trained.any():
        length = int(np.argmax(example.trained)) if example.trained.any() else len(example.tokens)
        raise Unusable("prompt too long", f"the prompt has {length} tokens; expected fewer than {max_tokens}")
    return kept


def flagged(example: Example) -> np.ndarray:
    """An example as the int32 of a chunk."""
    return example.tokens + TRAINED * example.trained.astype(np.int32)


class Conversations:
    """The lines of a JSONL file in two splits by a hash of what the user asks first, so that no prompt is in both.

    Both tasks split a file of preferences alike: what DPO holds out, SFT on the same file has held out before.
    """

    def __init__(self, source: str, task: str):
        """Raises `InputError` for a file that is missing or has lines of another form, or none of one split."""
        self.source, self.task = source, task
        self.skipped = {split: Counter() for split in SPLITS}  # reasons of what the last `chunks` left out
        self._rows: dict[str, list[tuple[int, dict]]] = {split: [] for split in SPLITS}
        fractions = {}
        for number, row in lines(source):
            with of_line(source, number):
                is_preference = task == "preferences" or _is_preference(row)
                prompt = row.get("prompt") if is_preference else messages_of(row)[:-1]
            fractions[number] = fraction_of(prompt), row
        least = min((fraction for fraction, _ in fractions.values()), default=0.0)
        threshold = max(HELDOUT_FRACTION, least + 16**-8)  # a few lines may have none under 5 %: then the lowest
        for number, (fraction, row) in fractions.items():
            self._rows["heldout" if fraction < threshold else "train"].append((number, row))
        for split in SPLITS:
            if not self._rows[split]:
                asked = len({fraction for fraction, _ in fractions.values()})
                raise InputError(
                    f"{source} has {len(fractions)} lines, {asked} different first messages of a user, none in the "
                    f"{split} split; expected more"
                )

    def names(self, split: str) -> list[str]:
        """The numbers of the lines of a split."""
        return [str(number) for number, _ in self._rows[split]]

    def digest(self, split: str) -> str:
        """First 16 hex digits of the SHA-256 of a split's lines."""
        text = json.dumps([row for _, row in self._rows[split]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def texts(self, split: str) -> Iterator[str]:
        """What the messages of a split's usable lines say; of a preference the rejected response too."""
        for number, row in self._rows[split]:
            with contextlib.suppress(Unusable), of_line(self.source, number):
                messages = pair_of(row)[0] if self.task == "preferences" else messages_of(row)
                check(messages)
                yield from (message["content"] for message in messages)
                if self.task == "preferences":
                    yield row["rejected"]

    def chunks(self, split: str, template: Template, max_tokens: int) -> Iterator[np.ndarray]:
        """The usable lines of a split as chunks, put as `template` says."""
        skipped = self.skipped[split] = Counter()
        for number, row in self._rows[split]:
            try:
                with of_line(self.source, number):
                    yield self._chunk(number, row, template, max_tokens)
            except Unusable as unusable:
                skipped[unusable.reason] += 1

    def _chunk(self, number: int, row: Mapping, template: Template, max_tokens: int) -> np.ndarray:
        if self.task == "sft":
            return flagged(cut(template.example(messages_of(row)), max_tokens))
        *pair, rating = pair_of(row)
        examples = [cut(template.example(last_turn_only(messages)), max_tokens) for messages in pair]
        if np.array_equal(*(example.tokens for example in examples)):
            raise Unusable("chosen equal to rejected", f"chosen and rejected agree in their first {max_tokens} tokens")
        header = np.array([number, rating, len(examples[0].tokens)], np.int32)
        return np.concatenate([header, *map(flagged, examples)])


@contextlib.contextmanager
def of_line(source: str | Path, number: int) -> Iterator[None]:
    """Adds file and line to an `InputError` raised within."""
    try:
        yield
    except Unusable:
        raise
    except InputError as error:
        raise InputError(f"{source} line {number}: {error}") from error
