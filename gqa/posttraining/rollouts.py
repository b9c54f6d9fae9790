"""Responses drawn by the decoding engine in programs of fixed shapes, and what models say of them.

N is the most new tokens, S the prompts' length and T = S + N that of both. A response follows its prompt without
padding between; all padding is on the right, where a decoder's earlier positions do not see it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gqa.decode import generate
from gqa.decode.buckets import padded
from gqa.decode.sampling import sampling
from gqa.models.llama import Llama
from gqa.models.reward import RewardModel
from gqa.objectives.log_probs import target_log_probs
from gqa.objectives.ppo import combined_scores


class Responses(NamedTuple):
    """Prompts and what was drawn, row by row; a row that is not there has length 0."""

    tokens_BT: jax.Array  # prompt and response
    prompt_lengths_B: jax.Array
    response_BN: jax.Array  # with its EOS where it has one
    counts_B: jax.Array  # tokens of the response
    sampled_BN: jax.Array  # their log-probabilities, as they were drawn
    ended_B: jax.Array  # True where the response has an EOS

    @property
    def weights_BN(self) -> jax.Array:
        """1 on the response's tokens, 0 behind."""
        return (jnp.arange(self.response_BN.shape[1]) < self.counts_B[:, None]).astype(jnp.float32)


def draw(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    rows: np.ndarray,
    *,
    shape: tuple[int, int, int],
    eos_ids: Sequence[int],
    temperature: float,
    seed: int,
) -> Responses:
    """A response for each of `rows`, an equal number of neighbours for each prompt.

    Args:
      model: in its form for decoding.
      prompts: tokens; fewer than there is room for leave rows that are not there.
      rows: numbers of all rows: a row's draws are a function of the seed and its number.
      shape: room for prompts, S and N.
      eos_ids: tokens that end a response.
      temperature: divides the logits.
      seed: of the draws.
    """
    P, S, N = shape
    prompts_PS, lengths_P = padded(prompts, P, S)
    samples = len(rows) // P
    state = generate.prefill(model, prompts_PS, lengths_P, N)
    rows_B = np.asarray(rows, np.int32)
    state = generate.with_log_probs(generate.repeated(state, samples, rows_B))
    state = generate.decode(model, state, N, eos_ids=eos_ids, sampling=sampling(temperature), seed=seed)
    return _joined(prompts_PS, lengths_P, state, generate.eos_array(eos_ids))


@jax.jit
def _joined(prompts_PS, lengths_P, state: generate.State, eos_E) -> Responses:
    B, N = state.tokens_BN.shape
    times = B // len(prompts_PS)
    tokens_BT = jnp.pad(jnp.repeat(prompts_PS, times, axis=0), ((0, 0), (0, N)))
    lengths_B = jnp.repeat(lengths_P, times)
    write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start,)))
    return Responses(
        write(tokens_BT, state.tokens_BN, lengths_B),
        lengths_B,
        state.tokens_BN,
        state.counts_B,
        state.log_probs_BN,
        jnp.any(jnp.isin(state.tokens_BN, eos_E) & (jnp.arange(N) < state.counts_B[:, None]), axis=1),
    )


@jax.jit
def ended(responses: Responses, ending_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prompts and responses `[B, T + E]` with the end of the template's examples, and their lengths.

    `ending_E` is EOS and what follows it; a response that has an EOS lacks the latter alone. Reward models have only
    read responses that end so: of others they say anything, and a policy finds out what.
    """
    E = len(ending_E)
    lengths_B = responses.prompt_lengths_B + responses.counts_B
    is_there_B = responses.counts_B > 0
    # Where the ending would begin, the response's own EOS among it.
    starts_B = lengths_B - (responses.ended_B & is_there_B)
    tokens_BT = jnp.pad(responses.tokens_BT, ((0, 0), (0, E)))
    place_BT = jnp.arange(tokens_BT.shape[1]) - starts_B[:, None]
    is_end_BT = (place_BT >= (lengths_B - starts_B)[:, None]) & (place_BT < E) & is_there_B[:, None]
    tokens_BT = jnp.where(is_end_BT, ending_E[jnp.clip(place_BT, 0, E - 1)], tokens_BT)
    return tokens_BT, jnp.where(is_there_B, starts_B + E, lengths_B)


unstacked = jax.jit(lambda model: model.unstacked())


def in_parts(function: Callable, size: int, *arrays):
    """`function` of the arrays' rows, `size` of them at a time: the memory is that of one part."""
    split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
    found = jax.lax.map(lambda part: function(*part), split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def response_log_probs(model: Llama, responses: Responses, temperature: float) -> jax.Array:
    """Log-probability of each token of the responses, of logits over `temperature`, `[B, N]`."""
    logits_BNV = model.unembed(_before_tokens(model.features(responses.tokens_BT), responses)) / temperature
    return target_log_probs(logits_BNV, responses.response_BN)


def response_values(model: RewardModel, responses: Responses) -> jax.Array:
    """A reward model's score of what stands before each token of the responses, `[B, N]`."""
    scores_BT = model({"decoder_inputs": responses.tokens_BT, "targets_segments": None})
    return _before_tokens(scores_BT[..., None], responses)[..., 0]


def _before_tokens(values_BTX: jax.Array, responses: Responses) -> jax.Array:
    """Values at the position before each token of the responses, `[B, N, X]`."""
    offsets_N = jnp.arange(responses.response_BN.shape[1])
    positions_BN = jnp.maximum(responses.prompt_lengths_B[:, None] - 1, 0) + offsets_N
    return jnp.take_along_axis(values_BTX, positions_BN[..., None], axis=1)


@functools.partial(jax.jit, static_argnames="size")
def score(
    reward: RewardModel,
    safety: RewardModel | None,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    is_safety_B: jax.Array,
    *,
    gate: float,
    size: int,
) -> jax.Array:
    """The score of each row at its last token, of both models together as `combined_scores` says, `[B]` float32.

    `size` rows are scored at a time; `safety`: `None` where there is none.
    """

    def of_part(tokens_BT, lengths_B, is_safety_B):
        helpfulness_B = reward.at_end(tokens_BT, lengths_B)
        if safety is None:
            return helpfulness_B
        return combined_scores(helpfulness_B, safety.at_end(tokens_BT, lengths_B), is_safety_B, gate=gate)

    return in_parts(of_part, size, tokens_BT, lengths_B, is_safety_B)
