"""Many prompts of mixed length through few programs.

A decoder's finished rows are replaced by waiting prompts while the others go on (continuous batching, Orca). An
encoder-decoder, and beam search, take batches of prompts of about one length. Either way a prompt's result is what it
would give alone.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from gqa.decode import generate, speculative
from gqa.decode.beam import beam_search, check_beams
from gqa.decode.buckets import bucket, padded
from gqa.decode.sampling import Sampling
from gqa.errors import InputError
from gqa.models import Model, ModelConfig, llama
from gqa.nn.cache import check_cache_dtype

STEPS = 64  # most steps between two looks at the rows


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode."""

    max_new_tokens: int  # most new tokens of a prompt
    eos_ids: tuple[int, ...]  # tokens that end a row
    sampling: Sampling | None  # how tokens are drawn; None: the most likely one
    seed: int  # of the draws
    num_beams: int  # beams of the search; 1: none
    length_penalty: float  # of the search: above 0 favours long sequences
    batch_size: int  # rows decoded at a time
    cache_dtype: str | None = None  # int8 quantises the keys and values; None: the model's

    def __post_init__(self):
        check_beams(self.num_beams, self.length_penalty)
        if self.num_beams > 1 and self.sampling is not None:
            raise InputError(f"beams={self.num_beams} with sampling; expected beams=1 or no temperature, top_k, top_p")
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size} is below 1; expected 1 or more")
        if not 0 <= self.seed < 2**32:  # JAX keeps the lower 32 bits of others
            raise InputError(f"seed={self.seed}; expected 0..{2**32 - 1}; nearest: {min(max(self.seed, 0), 2**32 - 1)}")
        check_cache_dtype(self.cache_dtype)


@dataclasses.dataclass
class Draft:
    """A model that proposes tokens (speculative decoding), and what became of them so far."""

    model: Model  # of the same kind and vocabulary
    num_tokens: int  # proposed for each reading of the model
    num_proposed: int = 0
    num_accepted: int = 0


def check_prompt(config: ModelConfig, tokens: Sequence[int], max_new_tokens: int) -> None:
    """Raises `InputError` for a prompt that is empty, longer than the model allows or not of its vocabulary."""
    if not len(tokens):
        raise InputError("the prompt is empty; expected some text")
    if max(tokens) >= config.vocab_size:
        raise InputError(f"token {max(tokens)} is none of the model's; expected ids below {config.vocab_size}")
    if min(tokens) < 0:
        raise InputError(f"token {min(tokens)} is none of the model's; expected ids of 0 or more")
    generate.check_lengths(config, len(tokens), max_new_tokens)


def check_draft_prompt(config: ModelConfig, tokens: Sequence[int], max_new_tokens: int) -> None:
    """Raises `InputError` for a prompt longer than the draft of architecture `config` allows."""
    try:
        generate.check_lengths(config, len(tokens), max_new_tokens)
    except InputError as error:
        raise InputError(f"the draft: {error}") from None


def check_memory(model: Model, settings: Settings, length: int, draft: Draft | None = None) -> None:
    """Raises `InputError` when the caches of a batch of prompts of `length` tokens exceed the device's memory."""
    device = jax.devices()[0]
    statistics = device.memory_stats()
    if statistics:
        free = statistics["bytes_limit"] - statistics["bytes_in_use"]
    else:  # a CPU
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Beams have a cache each, and a second while they are reordered.
    rows = settings.num_beams * (2 if settings.num_beams > 1 else 1)
    row = rows * sum(
        generate.state_bytes(each, 1, bucket(length), settings.max_new_tokens, settings.cache_dtype)
        for each in [model, *([draft.model] if draft else [])]
    )
    if settings.batch_size * row > free:
        raise InputError(
            f"batch_size={settings.batch_size} needs {settings.batch_size * row / 1e9:.1f} GB of cache for "
            f"{length} + {settings.max_new_tokens} tokens a row, the device has {free / 1e9:.1f} GB; "
            + (f"largest that fits: {free // row}" if free >= row else "not even one row fits: choose fewer tokens")
        )


def generate_all(
    model: Model, prompts: Mapping[int, Sequence[int]], settings: Settings, draft: Draft | None = None
) -> Iterator[tuple[int, list[int]]]:
    """The new tokens of every prompt with its number, as they finish.

    Args:
      model: T5 or Llama, best `unstacked()`.
      prompts: tokens by number; a prompt's draws are a function of the seed and its number.
      settings: how to decode.
      draft: a model for speculative decoding, which takes batches of prompts of about one length; counts are added.

    Raises `InputError` for a prompt that `check_prompt` refuses or that is too long for the draft, for a batch that
    does not fit the memory, and for a draft with beams or of another kind or vocabulary.
    """
    if draft is not None:
        if settings.num_beams > 1:
            raise InputError(f"beams={settings.num_beams} with a draft; expected beams=1 or no draft")
        speculative.check_draft(model.config, draft.model.config, draft.num_tokens)
    for tokens in prompts.values():
        check_prompt(model.config, tokens, settings.max_new_tokens)
        if draft is not None:
            check_draft_prompt(draft.model.config, tokens, settings.max_new_tokens)
    if not prompts:
        return
    settings = dataclasses.replace(settings, batch_size=min(settings.batch_size, len(prompts)))
    longest = max(map(len, prompts.values()))
    check_memory(model, settings, longest, draft)
    if isinstance(model, llama.Llama) and settings.num_beams == 1 and draft is None:
        yield from _continuous(model, prompts, settings, bucket(longest))
    else:
        yield from _by_length(model, prompts, settings, draft)


def stream(model: Model, prompt: Sequence[int], settings: Settings, chunk: int) -> Iterator[list[int]]:
    """The new tokens of one prompt: the first by itself, then `chunk` at a time, each with one trip to the device."""
    check_prompt(model.config, prompt, settings.max_new_tokens)
    check_memory(model, dataclasses.replace(settings, batch_size=1), len(prompt))
    inputs, lengths = padded([prompt], 1, bucket(len(prompt)))
    state = generate.prefill(model, inputs, lengths, settings.max_new_tokens, cache_dtype=settings.cache_dtype)
    seen, finished = 0, False
    while not finished:
        state = _advance(model, state, settings, steps=chunk if seen else 1)
        tokens, count, finished = jax.device_get((state.tokens_BN[0], state.counts_B[0], state.finished_B[0]))
        yield tokens[seen:count].tolist()
        seen = int(count)


def _advance(model: Model, state: generate.State, settings: Settings, steps: int, min_running: int = 1):
    return generate.decode(
        model,
        state,
        steps,
        eos_ids=settings.eos_ids,
        sampling=settings.sampling,
        seed=settings.seed,
        min_running=min_running,
    )


def _continuous(model, prompts, settings, longest: int) -> Iterator[tuple[int, list[int]]]:
    B = settings.batch_size
    length = longest + settings.max_new_tokens - 1
    state = generate.empty(model, B, length, settings.max_new_tokens, settings.cache_dtype)
    waiting, running = deque(prompts.items()), {}  # the number of the prompt in each place
    while waiting or running:
        for place in range(B):
            if waiting and place not in running:
                number, tokens = waiting.popleft()
                prompt_1S, (length,) = padded([tokens], 1, bucket(len(tokens)))
                state = generate.admit(model, state, prompt_1S, length, place, settings.max_new_tokens, number)
                running[place] = number
        # While prompts wait, every place is taken: the loop ends with the first row that does.
        state = _advance(model, state, settings, STEPS, min_running=B if waiting else 1)
        finished_B, counts_B, tokens_BN = jax.device_get((state.finished_B, state.counts_B, state.tokens_BN))
        for place in [place for place in running if finished_B[place]]:
            yield running.pop(place), tokens_BN[place, : counts_B[place]].tolist()


def _by_length(model, prompts, settings, draft: Draft | None) -> Iterator[tuple[int, list[int]]]:
    B = settings.batch_size
    numbers = sorted(prompts, key=lambda number: len(prompts[number]))
    for batch in (numbers[first : first + B] for first in range(0, len(numbers), B)):
        inputs, lengths = padded([prompts[number] for number in batch], B, bucket(len(prompts[batch[-1]])))
        rows = np.pad(np.array(batch, np.int32), (0, B - len(batch)))
        if settings.num_beams > 1:
            beams = beam_search(
                model,
                inputs,
                lengths,
                max_new_tokens=settings.max_new_tokens,
                eos_ids=settings.eos_ids,
                num_beams=settings.num_beams,
                length_penalty=settings.length_penalty,
                cache_dtype=settings.cache_dtype,
            )
            tokens_BN, counts_B = jax.device_get((beams.tokens_BWN[:, 0], beams.counts_BW[:, 0]))
        elif draft is not None:
            made = speculative.generate(
                model,
                draft.model,
                inputs,
                lengths,
                max_new_tokens=settings.max_new_tokens,
                eos_ids=settings.eos_ids,
                sampling=settings.sampling,
                seed=settings.seed,
                num_drafted=draft.num_tokens,
                rows_B=rows,
                cache_dtype=settings.cache_dtype,
            )
            tokens_BN, counts_B, num_proposed, num_accepted = jax.device_get(tuple(made))
            draft.num_proposed += int(num_proposed)
            draft.num_accepted += int(num_accepted)
        else:
            state = generate.prefill(
                model, inputs, lengths, settings.max_new_tokens, rows, cache_dtype=settings.cache_dtype
            )
            state = _advance(model, state, settings, settings.max_new_tokens)
            tokens_BN, counts_B = jax.device_get((state.tokens_BN, state.counts_B))
        for place, number in enumerate(batch):
            yield number, tokens_BN[place, : counts_B[place]].tolist()
