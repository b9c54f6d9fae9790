"""What a chunk of tokens becomes under each task: one (inputs, targets) pair, a function of the noise.

| task | model | inputs | targets |
|---|---|---|---|
| `span_corruption` | encoder-decoder | tokens with a sentinel for each noise span | the noise spans |
| `prefix_lm` | encoder-decoder | tokens before a random pivot | the rest |
| `causal_lm` | decoder only | none | all tokens; a document ends with EOS |
| `supervised` | encoder-decoder | what is asked | the answer |
| `sft` | decoder only | none | all tokens of a conversation after its first; loss on responses alone |
| `preferences` | decoder only | none | as of `sft`, for a prompt with each of two responses |

The lengths of both sides depend on the chunk alone, not on the noise: so rows are packed once, and noise is drawn when
a row is read. A chunk is a piece of a document; of `supervised`, the number of inputs, the inputs and the targets;
of conversations, tokens with those that are trained flagged.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gqa.data.span_corruption import (
    MEAN_NOISE_SPAN_LENGTH,
    NOISE_DENSITY,
    inputs_targets_lengths,
    noise_counts,
    noise_span_to_unique_sentinel,
    nonnoise_span_to_unique_sentinel,
    random_spans_noise_mask,
    tokens_length,
)
from gqa.data.vocabulary import NUM_SENTINELS, Vocabulary
from gqa.errors import InputError

_NOISE = (NOISE_DENSITY, MEAN_NOISE_SPAN_LENGTH)
SMALLEST_ROW = 8  # tokens; a shorter row holds next to nothing


class _Document:
    """A task on pieces of documents or on conversations, whose room follows from their number of tokens."""

    def room(self, chunk: np.ndarray) -> tuple[int, int]:
        """Room that a chunk takes in (inputs, targets)."""
        return self.lengths(len(chunk))

    @property
    def least_room(self) -> tuple[int, int]:
        """Room that the smallest chunk takes."""
        return self.lengths(self.min_tokens)

    def num_tokens(self, chunk: np.ndarray) -> int:
        """Tokens of text in a chunk."""
        return len(chunk)


@dataclass(frozen=True)
class SpanCorruption(_Document):
    """T5's span corruption of chunks of at most `max_tokens`."""

    inputs_length: int
    targets_length: int
    vocabulary_size: int

    ends_documents = False  # with an EOS token of the document's own: both sides get theirs with every chunk
    min_tokens = 4  # 15 % of fewer tokens rounds to no noise at all

    @functools.cached_property
    def max_tokens(self) -> int:
        num_tokens = tokens_length(self.inputs_length, *_NOISE)
        while num_tokens >= self.min_tokens and (
            self.lengths(num_tokens)[1] > self.targets_length or noise_counts(num_tokens, *_NOISE)[1] > NUM_SENTINELS
        ):
            num_tokens -= 1
        return num_tokens

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        """Room that a chunk of so many tokens takes in (inputs, targets)."""
        return inputs_targets_lengths(num_tokens, *_NOISE)

    def example(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        mask = random_spans_noise_mask(len(tokens), *_NOISE, rng)
        first_sentinel = self.vocabulary_size - 1
        inputs = noise_span_to_unique_sentinel(tokens, mask, first_sentinel)
        targets = nonnoise_span_to_unique_sentinel(tokens, mask, first_sentinel)
        return _with_eos(inputs), _with_eos(targets)

    def expected_targets(self, num_tokens: int) -> tuple[float, int, int]:
        """Share of a chunk's tokens that are targets, and the numbers of sentinels and of EOS that are added."""
        num_noise_tokens, num_noise_spans = noise_counts(num_tokens, *_NOISE)
        return num_noise_tokens / num_tokens, num_noise_spans, 1


@dataclass(frozen=True)
class PrefixLM(_Document):
    """A chunk of n tokens cut at a pivot drawn from 1..n-1.

    Either side may turn out n long, EOS included, so a chunk takes n in both: about half of each row is padding.
    """

    inputs_length: int
    targets_length: int
    vocabulary_size: int

    ends_documents = False
    min_tokens = 2

    @property
    def max_tokens(self) -> int:
        return min(self.inputs_length, self.targets_length)

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        return num_tokens, num_tokens

    def example(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pivot = rng.integers(1, len(tokens))
        return _with_eos(tokens[:pivot]), _with_eos(tokens[pivot:])

    def expected_targets(self, num_tokens: int) -> tuple[float, int, int]:
        return 0.5, 0, 1


@dataclass(frozen=True)
class CausalLM(_Document):
    """All tokens of a chunk as targets of a decoder without inputs: `inputs_length` is 0."""

    inputs_length: int
    targets_length: int
    vocabulary_size: int

    ends_documents = True
    min_tokens = 2

    @property
    def max_tokens(self) -> int:
        return self.targets_length

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        return 0, num_tokens

    def example(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return tokens[:0], tokens

    def expected_targets(self, num_tokens: int) -> tuple[float, int, int]:
        return 1.0, 0, 0


@dataclass(frozen=True)
class Supervised:
    """Pairs of inputs and targets, each with its EOS; what does not fit is cut off before it, as seqio does."""

    inputs_length: int
    targets_length: int
    vocabulary_size: int

    least_room = (2, 2)  # a token and EOS

    def chunk(self, inputs: Sequence[int], targets: Sequence[int]) -> np.ndarray:
        """The chunk of a pair without EOS."""
        inputs, targets = inputs[: self.inputs_length - 1], targets[: self.targets_length - 1]
        end = 1 + len(inputs)
        chunk = np.empty(end + len(targets) + 2, np.int32)
        chunk[0] = end
        chunk[1:end], chunk[end] = inputs, Vocabulary.eos_id
        chunk[end + 1 : -1], chunk[-1] = targets, Vocabulary.eos_id
        return chunk

    def room(self, chunk: np.ndarray) -> tuple[int, int]:
        """Room that a chunk takes in (inputs, targets)."""
        return int(chunk[0]), len(chunk) - 1 - int(chunk[0])

    def num_tokens(self, chunk: np.ndarray) -> int:
        """Tokens of both sides."""
        return len(chunk) - 1

    def example(self, chunk: np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        return chunk[1 : 1 + chunk[0]], chunk[1 + chunk[0] :]


TRAINED = 1 << 30  # added to a token of a conversation that is trained; no vocabulary is that large
PAIR_HEADER = 3  # numbers before the tokens of a pair: its own, its rating, the length of the chosen part


@dataclass(frozen=True)
class SFT(_Document):
    """Conversations with their trained tokens flagged; the first token of each is predicted from nothing: no target."""

    inputs_length: int
    targets_length: int
    vocabulary_size: int

    min_tokens = 2

    @property
    def max_tokens(self) -> int:
        return self.targets_length + 1

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        return 0, num_tokens - 1


@dataclass(frozen=True)
class Preferences(_Document):
    """A pair's two conversations, one after the other behind a header of `PAIR_HEADER` numbers."""

    inputs_length: int
    targets_length: int
    vocabulary_size: int

    min_tokens = PAIR_HEADER + 4

    @property
    def max_tokens(self) -> int:
        """Of one of the two."""
        return self.targets_length // 2

    @property
    def max_pairs(self) -> int:
        """Pairs that fit a row: each part of one has two tokens or more."""
        return self.targets_length // 4

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        return 0, num_tokens - PAIR_HEADER

    def num_tokens(self, chunk: np.ndarray) -> int:
        """Tokens of both conversations."""
        return len(chunk) - PAIR_HEADER


Task = SpanCorruption | PrefixLM | CausalLM | Supervised | SFT | Preferences
CONVERSATIONS = {"sft": SFT, "preferences": Preferences}
TASKS = {
    "span_corruption": SpanCorruption,
    "prefix_lm": PrefixLM,
    "causal_lm": CausalLM,
    "supervised": Supervised,
    **CONVERSATIONS,
}
DECODER_TASKS = ("causal_lm", *CONVERSATIONS)  # without inputs


def make_task(name: str, inputs_length: int, targets_length: int | None, vocabulary_size: int) -> Task:
    """The task `name` for rows of the given lengths.

    `targets_length` None is what the inputs call for: span corruption's own length (114 for 512), the same as the
    inputs for prefix LM. Causal LM has a single row, of `inputs_length` tokens; pairs need both lengths. Raises
    `InputError` for an unknown task and for lengths that hold no example.
    """
    if name not in TASKS:
        raise InputError(f"task={name!r} is unknown; expected one of {', '.join(TASKS)}")
    if inputs_length < SMALLEST_ROW:
        raise InputError(f"inputs_length={inputs_length} is too short; expected {SMALLEST_ROW} or more")
    if name in DECODER_TASKS:
        if targets_length not in (None, inputs_length):
            raise InputError(
                f"targets_length={targets_length} has no meaning for {name}; expected none or {inputs_length}"
            )
        return TASKS[name](0, inputs_length, vocabulary_size)
    if name == "supervised":
        if targets_length is None or targets_length < 2:
            raise InputError(f"targets_length={targets_length} holds no target of supervised; expected 2 or more")
        return Supervised(inputs_length, targets_length, vocabulary_size)
    if targets_length is None:
        needed = inputs_targets_lengths(tokens_length(inputs_length, *_NOISE), *_NOISE)[1]
        targets_length = needed if name == "span_corruption" else inputs_length
    task = TASKS[name](inputs_length, targets_length, vocabulary_size)
    if task.max_tokens < task.min_tokens:
        smallest = task.lengths(task.min_tokens)[1]
        raise InputError(f"targets_length={targets_length} holds no example of {name}; expected {smallest} or more")
    return task


def _with_eos(tokens: np.ndarray) -> np.ndarray:
    return np.append(tokens, Vocabulary.eos_id)
