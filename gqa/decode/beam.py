"""Beam search with a length penalty, token for token as transformers 5 does it (`early_stopping=False`).

The W beams of a row are rows of one batch beside each other. An encoder-decoder's beams share the keys and values of
their input.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa.decode.generate import PAD_ID, State, eos_array, prefill
from gqa.errors import InputError
from gqa.models import Model, llama

IMPOSSIBLE = -1e9  # transformers' score of what may not be chosen; added, so that order among such stays


class Beams(NamedTuple):
    """The best sequences found, best first."""

    tokens_BWN: jax.Array  # new tokens up to and with EOS, then `PAD_ID`
    counts_BW: jax.Array  # how many
    scores_BW: jax.Array  # log-probability of the new tokens over their number to the power of the length penalty


class _Search(NamedTuple):
    step: jax.Array
    inputs_R1: jax.Array  # R = B * W, the beams of a row beside each other
    cache: object
    running: Beams  # sequences that go on; their scores without the penalty
    finished: Beams
    is_finished_BW: jax.Array  # whether `finished` holds a sequence there
    improvable_B: jax.Array  # whether a running beam may still beat the worst finished one
    can_go_on: jax.Array


def check_beams(num_beams: int, length_penalty: float) -> None:
    """Raises `InputError` for a number of beams below 1 and a length penalty that is no finite number."""
    if num_beams < 1:
        raise InputError(f"num_beams={num_beams} is below 1; expected 1 or more")
    if not np.isfinite(length_penalty):
        raise InputError(f"length_penalty={length_penalty} is not finite; expected a number such as 1.0")


def beam_search(
    model: Model,
    inputs_BS: jax.Array,
    lengths_B: Sequence[int] | None,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    num_beams: int,
    length_penalty: float,
    cache_dtype: str | None = None,
) -> Beams:
    """The `num_beams` best sequences of each row; other arguments and errors as of `gqa.decode.generate.prefill`.

    A row's search ends when its best running beam, at its present length, cannot beat its worst finished one.
    `length_penalty` above 0 favours long sequences, below 0 short ones.
    """
    check_beams(num_beams, length_penalty)
    V = model.config.vocab_size
    candidates = max(2, 1 + len(eos_ids)) * num_beams  # so that num_beams of them go on whatever ends
    if candidates > num_beams * V:
        raise InputError(f"num_beams={num_beams} with {len(eos_ids)} EOS tokens is too many for a vocabulary of {V}")
    state = prefill(model, inputs_BS, lengths_B, max_new_tokens, cache_dtype=cache_dtype)
    return _beam_search(model, state, eos_array(eos_ids), np.float32(length_penalty), num_beams, candidates)


@functools.partial(jax.jit, static_argnames=("num_beams", "num_candidates"))
def _beam_search(model: Model, state: State, eos_E, length_penalty, num_beams: int, num_candidates: int) -> Beams:
    B, N = state.tokens_BN.shape
    W, V = num_beams, model.config.vocab_size

    def repeat(leaf):
        return jnp.repeat(leaf, W, axis=1)

    cache = state.cache._replace(self_attention=jax.tree.map(repeat, state.cache.self_attention))
    if isinstance(cache, llama.DecoderCache):
        cache = cache._replace(index=jnp.repeat(cache.index, W))

    # Only the first beam counts at first: the others would choose the same tokens.
    first = jnp.where(jnp.arange(W) == 0, 0.0, IMPOSSIBLE)
    none = Beams(
        jnp.full((B, W, N), PAD_ID, jnp.int32), jnp.zeros((B, W), jnp.int32), jnp.full((B, W), IMPOSSIBLE, jnp.float32)
    )

    def unfinished(search: _Search):
        return search.can_go_on & jnp.any(search.improvable_B)

    def step(search: _Search) -> _Search:
        logits_R1V, cache = model.decode_step(search.inputs_R1, search.cache)
        log_probs_BWV = jax.nn.log_softmax(logits_R1V[:, 0], axis=-1).reshape(B, W, V)
        scores = (search.running.scores_BW[:, :, None] + log_probs_BWV).reshape(B, W * V)
        scores_BC, indices_BC = jax.lax.top_k(scores, num_candidates)
        beams_BC, ids_BC = indices_BC // V, (indices_BC % V).astype(jnp.int32)
        tokens_BCN = _take(search.running.tokens_BWN, beams_BC).at[:, :, search.step].set(ids_BC)
        counts_BC = jnp.broadcast_to(search.step + 1, ids_BC.shape)
        ends_BC = jnp.isin(ids_BC, eos_E) | (search.step + 1 >= N)

        running_scores_BC = scores_BC + ends_BC * IMPOSSIBLE
        kept_BW = jax.lax.top_k(running_scores_BC, W)[1]
        running = Beams(*(_take(part, kept_BW) for part in (tokens_BCN, counts_BC, running_scores_BC)))
        parents_BW = _take(beams_BC, kept_BW)

        # Of those that end, only the best W may be kept, and only where that can improve the row.
        ended_BC = ends_BC & (jnp.arange(num_candidates) < W)
        penalised_BC = scores_BC / (search.step + 1).astype(jnp.float32) ** length_penalty
        penalised_BC += ~search.improvable_B[:, None] * IMPOSSIBLE
        penalised_BC += ~ended_BC * IMPOSSIBLE
        merged = [
            jnp.concatenate(pair, axis=1)
            for pair in zip(
                (*search.finished, search.is_finished_BW),
                (tokens_BCN, counts_BC, penalised_BC, ended_BC),
                strict=True,
            )
        ]
        best_BW = jax.lax.top_k(merged[2], W)[1]
        *finished, is_finished_BW = (_take(part, best_BW) for part in merged)
        finished = Beams(*finished)

        rows_R = (jnp.arange(B)[:, None] * W + parents_BW).reshape(-1)
        reorder = lambda leaf: jnp.take(leaf, rows_R, axis=1)  # noqa: E731
        cache = cache._replace(self_attention=jax.tree.map(reorder, cache.self_attention))
        best_possible_B1 = running.scores_BW[:, :1] / (search.step + 1).astype(jnp.float32) ** length_penalty
        worst_B1 = jnp.min(finished.scores_BW, axis=1, keepdims=True)
        worst_BW = jnp.where(is_finished_BW, worst_B1, IMPOSSIBLE)
        return _Search(
            search.step + 1,
            _take(ids_BC, kept_BW).reshape(-1, 1),
            cache,
            running,
            finished,
            is_finished_BW,
            search.improvable_B & jnp.any(best_possible_B1 > worst_BW, axis=1),
            ~jnp.all(ends_BC),
        )

    start = _Search(
        jnp.int32(0),
        jnp.repeat(state.inputs_B1, W, axis=0),
        cache,
        none._replace(scores_BW=jnp.broadcast_to(first, (B, W))),
        none,
        jnp.zeros((B, W), bool),
        ~state.finished_B,
        jnp.bool_(True),
    )
    return jax.lax.while_loop(unfinished, step, start).finished


def _take(part, indices) -> jax.Array:
    """`part[b, indices[b, i]]` for every row `b`."""
    return jnp.take_along_axis(part, indices.reshape(indices.shape + (1,) * (part.ndim - 2)), axis=1)
