"""Decoding on the device: inputs are read into a cache (prefill), then a loop makes one token a row and step.

The loop is one program with a donated cache, which it updates in place; it ends as soon as no row is left to go on. A
`State` is what stands between its calls: stream by asking for a few steps at a time, fill finished rows with `admit`.
Rows of unequal length are padded on the right and each gives what it gives alone. Programs are compiled for shapes:
`gqa.decode.buckets` keeps their number small. A model decodes fastest in its `unstacked()` form.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa.decode.sampling import Sampling, log_probs, next_tokens
from gqa.errors import InputError
from gqa.models import Model, ModelConfig, llama, t5
from gqa.nn.cache import Cache

PAD_ID = 0  # fills rows after their EOS; T5's decoder starts from it (Raffel et al. 2020)


class State(NamedTuple):
    """Rows in the middle of decoding."""

    inputs_B1: jax.Array  # the next decoder input of each row
    cache: t5.DecoderCache | llama.DecoderCache
    tokens_BN: jax.Array  # new tokens, `PAD_ID` where there is none
    counts_B: jax.Array  # how many new tokens each row has
    limits_B: jax.Array  # how many it may have, at most N
    finished_B: jax.Array  # True after an EOS, at the limit, and for rows that are not there
    rows_B: jax.Array  # each row's number for the random draws, whatever batch it is in
    log_probs_BN: jax.Array | None = None  # of the new tokens, where they are kept (`with_log_probs`)


def generate(
    model: Model,
    inputs_BS: jax.Array,
    lengths_B: Sequence[int] | None,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
) -> State:
    """Decodes all rows to their end: `tokens_BN` up to and with each row's EOS, `counts_B` of them.

    Args:
      model: T5, which reads the inputs with its encoder, or Llama, which continues them.
      inputs_BS: inputs or prompts, padded on the right.
      lengths_B: their lengths, 0 for a row that is not there; `None`: no padding.
      max_new_tokens: most new tokens of a row.
      eos_ids: tokens that end a row; none: every row gets `max_new_tokens`.
      sampling: how tokens are drawn; `None`: the most likely one.
      seed: of the draws.

    Raises `InputError` as `prefill` does.
    """
    state = prefill(model, inputs_BS, lengths_B, max_new_tokens)
    return decode(model, state, max_new_tokens, eos_ids=eos_ids, sampling=sampling, seed=seed)


def prefill(
    model: Model,
    inputs_BS: jax.Array,
    lengths_B: Sequence[int] | None,
    max_new_tokens: int,
    rows_B: Sequence[int] | None = None,
    spare: int = 0,
    cache_dtype: str | None = None,
) -> State:
    """Reads the inputs into a cache with room for `max_new_tokens`; arguments as of `generate`.

    `rows_B` numbers the rows for the random draws, `None`: 0, 1, …; `spare` is further room in the cache;
    `cache_dtype` int8 quantises it, `None`: the model's. Raises `InputError` for `max_new_tokens` below 1 and for more
    tokens than a Llama has positions.
    """
    B, S = inputs_BS.shape
    lengths_B = np.full(B, S, np.int32) if lengths_B is None else np.asarray(lengths_B, np.int32)
    check_lengths(model.config, int(lengths_B.max()), max_new_tokens)
    rows_B = np.arange(B, dtype=np.int32) if rows_B is None else np.asarray(rows_B, np.int32)
    return prefill_program(model, jnp.asarray(inputs_BS), lengths_B, rows_B, max_new_tokens, spare, cache_dtype)


def check_lengths(config: ModelConfig, length: int, max_new_tokens: int) -> None:
    """Raises `InputError` unless a prompt of `length` tokens and `max_new_tokens` fit the model's positions."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} is below 1; expected 1 or more")
    if max_new_tokens >= 2**31:
        raise InputError(f"max_new_tokens={max_new_tokens} is no int32; expected fewer")
    if isinstance(config, llama.LlamaConfig) and length + max_new_tokens > config.max_position:
        room = config.max_position - max_new_tokens
        expected = f"at most {room} tokens" if room > 0 else f"max_new_tokens below {config.max_position}"
        raise InputError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"{config.max_position} positions; expected {expected}"
        )


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def prefill_program(
    model: Model, inputs_BS, lengths_B, rows_B, max_new_tokens: int, spare: int, cache_dtype: str | None
) -> State:
    """What `prefill` runs, to be lowered or traced without arrays."""
    B, S = inputs_BS.shape
    if isinstance(model, t5.T5):
        segments_BS = (jnp.arange(S) < lengths_B[:, None]).astype(jnp.int32)
        first_B1 = jnp.full((B, 1), PAD_ID, jnp.int32)
        cache = model.init_cache(inputs_BS, segments_BS, max_new_tokens + spare, cache_dtype)
    else:
        # The last new token is never read.
        first_B1, cache = _read_prompts(model, inputs_BS, lengths_B, S + max_new_tokens - 1 + spare, cache_dtype)
    return State(
        first_B1,
        cache,
        tokens_BN=jnp.full((B, max_new_tokens), PAD_ID, jnp.int32),
        counts_B=jnp.zeros(B, jnp.int32),
        limits_B=jnp.full(B, max_new_tokens, jnp.int32),
        finished_B=lengths_B == 0,
        rows_B=rows_B,
    )


def _read_prompts(model: llama.Llama, prompts_BS, lengths_B, length: int, cache_dtype):
    """Each prompt's last token, left to the first step of the loop, and a cache `length` long of those before it."""
    B, S = prompts_BS.shape
    last_B = jnp.maximum(lengths_B - 1, 0)
    _, cache = model.decode_step(prompts_BS, model.init_cache(B, S, cache_dtype))
    longer = ((0, 0),) * 3 + ((0, length - S), (0, 0))
    caches = jax.tree.map(lambda leaf: jnp.pad(leaf, longer), cache.self_attention)
    first_B1 = jnp.take_along_axis(prompts_BS, last_B[:, None], axis=1).astype(jnp.int32)
    return first_B1, llama.DecoderCache(caches, last_B)


def decode(
    model: Model,
    state: State,
    steps: int,
    *,
    eos_ids: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
    min_running: int = 1,
) -> State:
    """Up to `steps` further tokens of every row that is not finished; `state` is used up.

    Ends earlier when fewer than `min_running` rows are left to go on. Other arguments as of `generate`.
    """
    eos_E = eos_array(eos_ids)
    return decode_program(model, state, np.int32(steps), np.int32(min_running), eos_E, sampling, jax.random.key(seed))


def eos_array(eos_ids: Sequence[int]) -> np.ndarray:
    """The ids for a program, with others that no token has: up to four are one shape."""
    return np.array([*eos_ids, *[-1] * (-len(eos_ids) % 4 if eos_ids else 4)], np.int32)


def state_bytes(model: Model, batch_size: int, length: int, max_new_tokens: int, cache_dtype: str | None = None) -> int:
    """Bytes of the `State` that `prefill` makes of inputs of `length` tokens, nearly all of them the cache's."""
    inputs_BS = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    of_rows_B = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    state = jax.eval_shape(prefill_program, model, inputs_BS, of_rows_B, of_rows_B, max_new_tokens, 0, cache_dtype)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@functools.partial(jax.jit, donate_argnames="state")
def decode_program(model: Model, state: State, steps, min_running, eos_E, sampling: Sampling | None, key) -> State:
    """What `decode` runs, to be lowered or traced without arrays; the body of its loop is one step."""
    B = state.finished_B.shape[0]

    def unfinished(step_and_state):
        step, state = step_and_state
        return (step < steps) & (jnp.sum(~state.finished_B) >= min_running)

    def decode_tokens(step_and_state):
        step, state = step_and_state
        logits_B1V, cache = model.decode_step(state.inputs_B1, state.cache)
        next_B = next_tokens(logits_B1V[:, 0], sampling, key, state.rows_B, state.counts_B)
        log_probs_BN = state.log_probs_BN
        # A finished row writes behind the end: nowhere.
        places_B = jnp.where(state.finished_B, state.tokens_BN.shape[1], state.counts_B)
        if log_probs_BN is not None:
            of_next_B = log_probs(logits_B1V[:, 0], sampling, next_B)
            log_probs_BN = log_probs_BN.at[jnp.arange(B), places_B].set(of_next_B, mode="drop")
        next_B = jnp.where(state.finished_B, PAD_ID, next_B)
        if cache.index.ndim:  # a row that is finished stays where it is
            cache = cache._replace(index=jnp.where(state.finished_B, state.cache.index, cache.index))
        tokens_BN = state.tokens_BN.at[jnp.arange(B), places_B].set(next_B, mode="drop")
        counts_B = state.counts_B + ~state.finished_B
        return step + 1, state._replace(
            inputs_B1=next_B[:, None],
            cache=cache,
            tokens_BN=tokens_BN,
            counts_B=counts_B,
            finished_B=state.finished_B | (counts_B >= state.limits_B) | jnp.isin(next_B, eos_E),
            log_probs_BN=log_probs_BN,
        )

    return jax.lax.while_loop(unfinished, decode_tokens, (jnp.int32(0), state))[1]


def with_log_probs(state: State) -> State:
    """A state before its first step that keeps the log-probability of each new token, as it was drawn."""
    return state._replace(log_probs_BN=jnp.zeros(state.tokens_BN.shape, jnp.float32))


@functools.partial(jax.jit, static_argnames="times")
def repeated(state: State, times: int, rows_B: jax.Array) -> State:
    """Every row of a decoder's new state `times` times, beside each other: many samples of a prompt read once.

    `rows_B` numbers all of the rows for the draws.
    """
    cache = llama.DecoderCache(
        jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=1), state.cache.self_attention),
        jnp.repeat(state.cache.index, times, axis=0),
    )
    others = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), state._replace(cache=None))
    return others._replace(cache=cache, rows_B=rows_B)


@functools.partial(jax.jit, static_argnames=("batch_size", "length", "max_new_tokens", "cache_dtype"))
def empty(
    model: llama.Llama, batch_size: int, length: int, max_new_tokens: int, cache_dtype: str | None = None
) -> State:
    """A state of rows that are not there, for `admit`, its cache `length` long; `cache_dtype` as of `prefill`."""
    B = batch_size
    zeros_B = jnp.zeros(B, jnp.int32)
    return State(
        inputs_B1=jnp.full((B, 1), PAD_ID, jnp.int32),
        cache=model.init_cache(B, length, cache_dtype)._replace(index=zeros_B),
        tokens_BN=jnp.full((B, max_new_tokens), PAD_ID, jnp.int32),
        counts_B=zeros_B,
        limits_B=zeros_B,
        finished_B=jnp.ones(B, bool),
        rows_B=zeros_B,
    )


@functools.partial(jax.jit, donate_argnames="state")
def admit(model: llama.Llama, state: State, prompt_1S, length, place, limit, row) -> State:
    """Reads a prompt into the place of a finished row while the others stay as they are; `state` is used up.

    Args:
      model: a decoder; an encoder-decoder's rows start together.
      state: with a cache at least as long as the prompt and its new tokens.
      prompt_1S: the prompt, padded on the right.
      length: its length.
      place: the finished row's index in the batch.
      limit: most new tokens.
      row: the new row's number for the random draws.
    """
    cache_dtype = str(state.cache.self_attention[0].key.dtype)
    first_11, cache = _read_prompts(model, prompt_1S, jnp.reshape(length, 1), prompt_1S.shape[1], cache_dtype)

    def insert(all_rows: Cache, new: Cache) -> Cache:
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, place, 0, 0, 0)), all_rows, new)

    caches = [insert(*pair) for pair in zip(state.cache.self_attention, cache.self_attention, strict=True)]
    return State(
        inputs_B1=state.inputs_B1.at[place].set(first_11[0]),
        cache=llama.DecoderCache(caches, state.cache.index.at[place].set(cache.index[0])),
        tokens_BN=state.tokens_BN.at[place].set(PAD_ID),
        counts_B=state.counts_B.at[place].set(0),
        limits_B=state.limits_B.at[place].set(limit),
        finished_B=state.finished_B.at[place].set(False),
        rows_B=state.rows_B.at[place].set(row),
    )
