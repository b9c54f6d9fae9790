"""Speculative decoding: a cheap draft model proposes tokens, the model reads them all at once and keeps what fits.

Greedy outputs are exactly the model's own; drawn tokens have exactly its distribution, whatever the draft (Leviathan et
al. 2023, arXiv 2211.17192; Chen et al. 2023). A converted checkpoint with fewer key/value heads is a natural draft.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa.decode.generate import PAD_ID, State, eos_array, prefill
from gqa.decode.sampling import Sampling, next_tokens, processed_logits, row_keys
from gqa.errors import InputError
from gqa.models import FAMILIES, Model, ModelConfig, family_of


class Speculated(NamedTuple):
    """What speculative decoding made."""

    tokens_BN: jax.Array  # new tokens up to and with EOS, then `PAD_ID`
    counts_B: jax.Array  # how many
    num_proposed: jax.Array  # tokens that the draft proposed
    num_accepted: jax.Array  # how many of them were kept


class _Loop(NamedTuple):
    state: State
    draft_cache: object
    num_proposed: jax.Array
    num_accepted: jax.Array


def generate(
    model: Model,
    draft: Model,
    inputs_BS: jax.Array,
    lengths_B: Sequence[int] | None,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
    num_drafted: int,
    rows_B: Sequence[int] | None = None,
    cache_dtype: str | None = None,
) -> Speculated:
    """As `gqa.decode.generate.generate`, with up to `num_drafted + 1` tokens of every row for each reading of `model`.

    `draft` is any model of the same vocabulary that reads the same inputs; `rows_B` and `cache_dtype` (of both models)
    are as of `prefill`. Rows go on at their own pace. Raises `InputError` as `check_draft` does.
    """
    check_draft(model.config, draft.config, num_drafted)
    states = [
        prefill(m, inputs_BS, lengths_B, max_new_tokens, rows_B, spare=num_drafted, cache_dtype=cache_dtype)
        for m in (model, draft)
    ]
    key = jax.random.key(seed)
    loop = _generate(model, draft, states[0], states[1].cache, eos_array(eos_ids), sampling, key, num_drafted)
    return Speculated(loop.state.tokens_BN, loop.state.counts_B, loop.num_proposed, loop.num_accepted)


def check_draft(config: ModelConfig, draft: ModelConfig, num_drafted: int) -> None:
    """Raises `InputError` for a draft of another vocabulary or family than the model's, and `num_drafted` below 1."""
    if num_drafted < 1:
        raise InputError(f"num_drafted={num_drafted} is below 1; expected 1 or more")
    if type(draft) is not type(config) or draft.vocab_size != config.vocab_size:
        found, expected = (f"{FAMILIES[family_of(c)].model.__name__} of {c.vocab_size} tokens" for c in (draft, config))
        raise InputError(f"the draft is a {found}; expected the model's kind: a {expected}")


@functools.partial(jax.jit, static_argnames="num_drafted", donate_argnames=("state", "draft_cache"))
def _generate(model, draft, state: State, draft_cache, eos_E, sampling, key, num_drafted: int) -> _Loop:
    B, N = state.tokens_BN.shape
    candidates = jnp.arange(num_drafted + 1)
    draft_key, key = draft_and_own_key(key)

    def unfinished(loop: _Loop):
        return ~jnp.all(loop.state.finished_B)

    def propose(carry, number):
        inputs_B1, cache, state = carry
        logits_B1V, cache = draft.decode_step(inputs_B1, cache)
        tokens_B = next_tokens(logits_B1V[:, 0], sampling, draft_key, state.rows_B, state.counts_B + number)
        return (tokens_B[:, None], cache, state), (tokens_B, logits_B1V[:, 0])

    def round(loop: _Loop) -> _Loop:
        state, index_B = loop.state, loop.state.cache.index
        # One step more than is proposed: it writes the last proposal into the draft's cache.
        carry = state.inputs_B1, loop.draft_cache, state
        (_, draft_cache, _), (drafted, draft_logits) = jax.lax.scan(propose, carry, candidates)
        drafted_BG, draft_logits_BGV = drafted[:-1].T, draft_logits[:-1].swapaxes(0, 1)
        tokens_BT = jnp.concatenate([state.inputs_B1, drafted_BG], axis=1)
        logits_BTV, cache = model.decode_step(tokens_BT, state.cache)
        keys_B = row_keys(key, state.rows_B, state.counts_B)
        accepted_B, next_B = verify(keys_B, drafted_BG, draft_logits_BGV, logits_BTV, sampling)

        # Tokens of this round: what was accepted, then the model's own.
        made_BT = jnp.pad(drafted_BG, ((0, 0), (0, 1)))
        made_BT = jnp.where(candidates == accepted_B[:, None], next_B[:, None], made_BT)
        ends_BT = jnp.isin(made_BT, eos_E)
        first_end_B = jnp.where(ends_BT.any(axis=1), jnp.argmax(ends_BT, axis=1), num_drafted)
        count_B = jnp.minimum(jnp.minimum(accepted_B, first_end_B) + 1, state.limits_B - state.counts_B)
        count_B = jnp.where(state.finished_B, 0, count_B)
        last_B1 = jnp.take_along_axis(made_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)
        places_BT = jnp.where(candidates < count_B[:, None], state.counts_B[:, None] + candidates, N)
        counts_B = state.counts_B + count_B
        ended_B = jnp.isin(last_B1[:, 0], eos_E) | (counts_B >= state.limits_B)
        running = ~state.finished_B
        return _Loop(
            state._replace(
                inputs_B1=jnp.where(running[:, None], last_B1, PAD_ID),
                # What was rejected lies behind the index: never seen, and overwritten.
                cache=cache._replace(index=index_B + count_B),
                tokens_BN=state.tokens_BN.at[jnp.arange(B)[:, None], places_BT].set(made_BT, mode="drop"),
                counts_B=counts_B,
                finished_B=state.finished_B | ended_B,
            ),
            draft_cache._replace(index=index_B + count_B),
            # Proposals after a row's end were of no use to anyone: they count on neither side.
            loop.num_proposed + jnp.sum(jnp.where(running, jnp.where(accepted_B < count_B, num_drafted, count_B), 0)),
            loop.num_accepted + jnp.sum(jnp.where(running, jnp.minimum(accepted_B, count_B), 0)),
        )

    zero = jnp.zeros((), jnp.int32)
    index_B = jnp.broadcast_to(state.cache.index, (B,))
    state = state._replace(cache=state.cache._replace(index=index_B))
    # The caches go back out so that the donated buffers are used in place.
    return jax.lax.while_loop(unfinished, round, _Loop(state, draft_cache._replace(index=index_B), zero, zero))


def draft_and_own_key(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of the draft's draws and of the model's own.

    No key made of one by rows, steps and splits is made of the other: draws of the draft that were known to what
    accepts and replaces them would change the distribution.
    """
    draft_key, own_key = jax.random.split(key)
    return draft_key, own_key


def verify(
    keys_B: jax.Array,
    drafted_BG: jax.Array,
    draft_logits_BGV: jax.Array,
    logits_BTV: jax.Array,
    sampling: Sampling | None,
) -> tuple[jax.Array, jax.Array]:
    """How many of each row's G drafted tokens are kept, `[B]`, and the model's own token after them, `[B]`.

    Args:
      keys_B: a random key for each row.
      drafted_BG: tokens, drawn one after the other from the draft's distribution with the same `sampling`.
      draft_logits_BGV: what they were drawn with.
      logits_BTV: the model's logits at the same places and one further, T = G + 1.
      sampling: `None`: a token is kept if it is the model's most likely one.
    """
    G = drafted_BG.shape[1]
    if sampling is None:
        best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        accepted_B = _leading(drafted_BG == best_BT[:, :G])
        return accepted_B, jnp.take_along_axis(best_BT, accepted_B[:, None], axis=1)[:, 0]

    def probabilities(logits):
        flat = processed_logits(logits.reshape(-1, logits.shape[-1]), sampling)
        return jax.nn.softmax(flat, axis=-1).reshape(logits.shape)

    p_BTV, q_BGV = probabilities(logits_BTV), probabilities(draft_logits_BGV)
    p_BG, q_BG = (jnp.take_along_axis(of[:, :G], drafted_BG[..., None], axis=-1)[..., 0] for of in (p_BTV, q_BGV))
    uniform_key_B, draw_key_B = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys_B)
    uniform_BG = jax.vmap(lambda key: jax.random.uniform(key, (G,)))(uniform_key_B)
    accepted_B = _leading(uniform_BG * q_BG < p_BG)  # with probability min(1, p / q)
    # After a rejection from what the draft has too little of, max(0, p - q); after none from p itself.
    q_BTV = jnp.pad(q_BGV, ((0, 0), (0, 1), (0, 0)))
    place = accepted_B[:, None, None]
    p_BV, q_BV = (jnp.take_along_axis(of, place, axis=1)[:, 0] for of in (p_BTV, q_BTV))
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    next_B = jax.vmap(jax.random.categorical)(draw_key_B, jnp.log(rest_BV))
    return accepted_B, next_B.astype(jnp.int32)


def _leading(kept_BG: jax.Array) -> jax.Array:
    """How many in a row are kept from the first on."""
    return jnp.sum(jnp.cumprod(kept_BG.astype(jnp.int32), axis=1), axis=1)
