"""Greedy decoding on the device: a prefill, then a loop over single tokens with a donated cache.

Both parts compile once per shape and may be called apart, to be timed apart. A model decodes fastest in its
`unstacked()` form.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa.errors import InputError
from gqa.models import Model, llama, t5

PAD_ID = 0  # fills rows after their EOS; T5's decoder starts from it (Raffel et al. 2020)


class Prefilled(NamedTuple):
    """What decoding starts from."""

    tokens_B1: jax.Array  # the next decoder input of each row
    cache: t5.DecoderCache | llama.DecoderCache
    segments_BS: jax.Array | None  # Llama: 0 on the prompts' padding, as long as the cache


def greedy(
    model: Model, inputs_BS: jax.Array, inputs_segments_BS: jax.Array | None, max_tokens: int, eos_id: int | None
) -> jax.Array:
    """The most likely token at every step.

    Args:
      model: T5, which reads the inputs with its encoder, or Llama, which continues them.
      inputs_BS: inputs or prompts; Llama's prompts are padded on the left.
      inputs_segments_BS: 0 on padding, 1 elsewhere; `None`: no padding.
      max_tokens: most new tokens.
      eos_id: token that ends a row; the loop ends when all rows have. `None`: exactly `max_tokens` steps.

    Returns:
      New tokens `[B, max_tokens]` int32: up to and with the row's EOS, then `PAD_ID`.

    Raises:
      InputError: for prompts padded on the right and for `max_tokens` below 1.
    """
    return decode(model, prefill(model, inputs_BS, inputs_segments_BS, max_tokens), max_tokens, eos_id)


def prefill(model: Model, inputs_BS: jax.Array, inputs_segments_BS: jax.Array | None, max_tokens: int) -> Prefilled:
    """Reads the inputs into a cache with room for `max_tokens` new tokens; arguments and errors as of `greedy`."""
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens} must be at least 1")
    if isinstance(model, t5.T5):
        return _prefill_t5(model, inputs_BS, inputs_segments_BS, max_tokens)
    if inputs_segments_BS is not None:
        ends_in_padding = np.asarray(inputs_segments_BS)[:, -1] == 0
        if ends_in_padding.any():
            raise InputError(f"prompt {ends_in_padding.argmax()} ends in padding; pad prompts on the left")
    return _prefill_llama(model, inputs_BS, inputs_segments_BS, max_tokens)


@functools.partial(jax.jit, static_argnames=("max_tokens", "eos_id"), donate_argnames="prefilled")
def _decode(model: Model, prefilled: Prefilled, max_tokens: int, eos_id: int | None) -> tuple[jax.Array, Prefilled]:
    B = prefilled.tokens_B1.shape[0]

    def unfinished(state):
        step, _, _, finished_B = state
        return (step < max_tokens) & ~jnp.all(finished_B)

    def decode_token(state):
        step, tokens_BN, prefilled, finished_B = state
        if isinstance(model, t5.T5):
            logits_B1V, cache = model.decode_step(prefilled.tokens_B1, prefilled.cache)
        else:
            logits_B1V, cache = model.decode_step(prefilled.tokens_B1, prefilled.cache, prefilled.segments_BS)
        next_B1 = jnp.argmax(logits_B1V, axis=-1).astype(jnp.int32)
        next_B1 = jnp.where(finished_B[:, None], PAD_ID, next_B1)
        if eos_id is not None:
            finished_B |= next_B1[:, 0] == eos_id
        tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, next_B1, (0, step))
        return step + 1, tokens_BN, prefilled._replace(tokens_B1=next_B1, cache=cache), finished_B

    tokens_BN = jnp.full((B, max_tokens), PAD_ID, jnp.int32)
    state = jnp.zeros((), jnp.int32), tokens_BN, prefilled, jnp.zeros(B, bool)
    _, tokens_BN, prefilled, _ = jax.lax.while_loop(unfinished, decode_token, state)
    # The cache goes back out so that the donated buffers are used in place.
    return tokens_BN, prefilled


def decode(model: Model, prefilled: Prefilled, max_tokens: int, eos_id: int | None) -> jax.Array:
    """New tokens `[B, max_tokens]` as of `greedy`; `prefilled`, made for as many tokens, is used up."""
    return _decode(model, prefilled, max_tokens, eos_id)[0]


@functools.partial(jax.jit, static_argnames="max_tokens")
def _prefill_t5(model: t5.T5, inputs_BS, inputs_segments_BS, max_tokens: int) -> Prefilled:
    start_B1 = jnp.full((inputs_BS.shape[0], 1), PAD_ID, jnp.int32)
    return Prefilled(start_B1, model.init_cache(inputs_BS, inputs_segments_BS, max_tokens), None)


@functools.partial(jax.jit, static_argnames="max_tokens")
def _prefill_llama(model: llama.Llama, prompts_BS, prompts_segments_BS, max_tokens: int) -> Prefilled:
    B, S = prompts_BS.shape
    # The last prompt token is left to the first step of the loop, and the last new token is never read.
    length = S + max_tokens - 1
    segments_BS = None
    if prompts_segments_BS is not None:
        segments_BS = jnp.pad(prompts_segments_BS, ((0, 0), (0, length - S)), constant_values=1)
    cache = model.init_cache(B, length)
    if S > 1:
        _, cache = model.decode_step(prompts_BS[:, :-1], cache, segments_BS)
    return Prefilled(prompts_BS[:, -1:].astype(jnp.int32), cache, segments_BS)
