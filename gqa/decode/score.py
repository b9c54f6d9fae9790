"""What models say of given texts, in one pass and without a cache: log-probabilities of continuations, rewards."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gqa.decode.buckets import bucket, padded
from gqa.decode.generate import PAD_ID
from gqa.errors import InputError
from gqa.models import Model, t5
from gqa.models.reward import RewardModel


def score(model: Model, inputs: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probability, in nats, of every token of each continuation given its input and the tokens before.

    Arguments, shapes and errors as of `score_and_rank`.
    """
    return [log_probs for log_probs, _ in score_and_rank(model, inputs, continuations)]


def score_and_rank(
    model: Model, inputs: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`score`, and for every token whether it is the most likely one there.

    Args:
      model: T5, whose decoder starts from padding, or Llama, whose continuations follow their prompts.
      inputs: a row of tokens each; Llama's have at least one, which the first token is predicted from.
      continuations: as many rows.

    Returns:
      For each row a float32 and a bool array as long as its continuation. Programs compile for buckets of both lengths.

    Raises `InputError` for rows that do not pair up, empty prompts of a Llama and more tokens than it has positions.
    """
    if len(inputs) != len(continuations):
        raise InputError(f"{len(inputs)} inputs and {len(continuations)} continuations; expected as many of each")
    if not inputs:
        return []
    B, T = len(inputs), bucket(max(map(len, continuations)))
    inputs_BS, lengths_B = padded(inputs, B, bucket(max(map(len, inputs))))
    continuations_BT, _ = padded(continuations, B, T)
    if not isinstance(model, t5.T5):
        for number, (prompt, continuation) in enumerate(zip(inputs, continuations, strict=True)):
            if not len(prompt):
                raise InputError(f"prompt {number} is empty; expected at least one token, such as BOS")
            limit = model.config.max_position
            if len(prompt) + max(len(continuation) - 1, 0) > limit:  # the last token is never read
                raise InputError(
                    f"prompt {number} and its continuation have {len(prompt)} + {len(continuation)} tokens; "
                    f"expected at most one more than the model's {limit} positions"
                )
    log_probs_BT, best_BT = jax.device_get(_score(model, inputs_BS, lengths_B, continuations_BT))
    lengths = map(len, continuations)
    return [(row[:length], best[:length]) for row, best, length in zip(log_probs_BT, best_BT, lengths, strict=True)]


def rewards(model: RewardModel, texts: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    """The score of each text in tokens at its last one, float32; texts of like length are read together.

    Raises `InputError` for a text of more tokens than the model has positions.
    """
    limit = model.config.max_position
    found = np.empty(len(texts), np.float32)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    if order and len(texts[order[-1]]) > limit:
        raise InputError(f"a text has {len(texts[order[-1]])} tokens; the model has {limit} positions")
    for first in tqdm(range(0, len(order), batch_size), desc="score", unit="batch", delay=2, dynamic_ncols=True):
        here = order[first : first + batch_size]
        longest = min(bucket(len(texts[here[-1]])), limit)
        tokens_BT, lengths_B = padded([texts[number] for number in here], batch_size, longest)
        found[here] = np.asarray(_at_end(model, tokens_BT, lengths_B))[: len(here)]
    return found


_at_end = jax.jit(RewardModel.at_end)


@jax.jit
def _score(model: Model, inputs_BS, lengths_B, continuations_BT) -> tuple[jax.Array, jax.Array]:
    S, T = inputs_BS.shape[1], continuations_BT.shape[1]
    if isinstance(model, t5.T5):
        segments_BS = (jnp.arange(S) < lengths_B[:, None]).astype(jnp.int32)
        shifted_BT = jnp.pad(continuations_BT[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
        logits_BTV = model(inputs_BS, shifted_BT, inputs_segments_BS=segments_BS)
    else:
        # A continuation overwrites its prompt's padding; what follows it is padding that nothing before it sees.
        tokens = jnp.pad(inputs_BS, ((0, 0), (0, T)))
        write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start,)))
        logits = model(write(tokens, continuations_BT, lengths_B))
        positions_BT = lengths_B[:, None] - 1 + jnp.arange(T)
        logits_BTV = jnp.take_along_axis(logits, positions_BT[:, :, None], axis=1)
    chosen_BT = jnp.take_along_axis(logits_BTV, continuations_BT[:, :, None], axis=-1)[:, :, 0]
    best_BT = jnp.argmax(logits_BTV, axis=-1) == continuations_BT
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1), best_BT
