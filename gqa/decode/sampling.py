"""Drawing tokens: temperature, top-k and nucleus (top-p) sampling, as transformers orders them.

A row's draw at a step is a function of (seed, row, step) alone, so it does not change with the rows beside it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gqa.errors import InputError

SMALLEST_TEMPERATURE = 1e-30  # logits over it are still finite in float32


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["temperature", "top_p"], meta_fields=["top_k"]
)  # programs are compiled for each top_k and for top_p being there, not for each temperature
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; made by `sampling`, which checks it."""

    temperature: float  # divides the logits; 1 draws from the model's own distribution
    top_k: int | None  # draws from the k most likely tokens (Fan et al. 2018); None: from all
    top_p: float | None  # from the fewest most likely tokens that hold this probability (Holtzman et al. 2020)


def sampling(temperature: float, top_k: int | None = None, top_p: float | None = None) -> Sampling:
    """The settings, checked: raises `InputError` for what no distribution can be drawn with."""
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature={temperature} is not above 0; leave it out for the most likely token every time")
    if temperature < SMALLEST_TEMPERATURE:
        raise InputError(
            f"temperature={temperature} is below {SMALLEST_TEMPERATURE}, float32 cannot hold what it makes of logits; "
            "leave it out for the most likely token every time"
        )
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k} is below 1; expected 1 or more, or none for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} is not above 0 and at most 1; nearest: {0.01 if top_p <= 0 else 1.0}")
    # All tokens hold 1, whatever a sum of rounded probabilities says.
    return Sampling(temperature, top_k, None if top_p == 1 else top_p)


def processed_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits `[B, V]` of the distribution that is drawn from: -inf on tokens that top-k and top-p leave out."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        # Without the barrier XLA merges what follows into it, and on CPUs sorts the whole vocabulary.
        descending_Bk, tokens_Bk = jax.lax.optimization_barrier(jax.lax.top_k(logits_BV, sampling.top_k))
    elif sampling.top_p is not None:
        tokens_Bk = jnp.argsort(logits_BV, axis=-1, descending=True)
        descending_Bk = jnp.take_along_axis(logits_BV, tokens_Bk, axis=-1)
    else:
        return logits_BV
    stays_Bk = jnp.ones(tokens_Bk.shape, bool)
    if sampling.top_p is not None:
        probabilities_Bk = jax.nn.softmax(descending_Bk, axis=-1)
        # A token stays while those before it hold less than top_p: the first always does.
        stays_Bk = jnp.cumsum(probabilities_Bk, axis=-1) - probabilities_Bk < sampling.top_p
    # By place, not by value: of equal ones no more stay than were asked for.
    stays_BV = jnp.put_along_axis(jnp.zeros(logits_BV.shape, bool), tokens_Bk, stays_Bk, axis=-1, inplace=False)
    return jnp.where(stays_BV, logits_BV, -jnp.inf)


def row_keys(key: jax.Array, rows_B: jax.Array, steps_B: jax.Array) -> jax.Array:
    """A random key for each row's step, whatever batch the row is in. `[B]`."""
    return jax.vmap(lambda row, step: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows_B, steps_B)


def next_tokens(
    logits_BV: jax.Array, sampling: Sampling | None, key: jax.Array, rows_B: jax.Array, steps_B: jax.Array
) -> jax.Array:
    """A token for each row, `[B]` int32: drawn, or the most likely one where there is no `sampling`."""
    if sampling is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    return draw(row_keys(key, rows_B, steps_B), processed_logits(logits_BV, sampling)).astype(jnp.int32)


def log_probs(logits_BV: jax.Array, sampling: Sampling | None, tokens_B: jax.Array) -> jax.Array:
    """`log p` of each row's token in the distribution that it was drawn from, float32 `[B]`."""
    if sampling is not None:
        logits_BV = processed_logits(logits_BV, sampling)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
