"""Direct preference optimisation (Rafailov et al. 2023) and its variants, of log-probabilities of whole responses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa.errors import InputError

LOSSES = ("sigmoid", "ipo")


class Pair(NamedTuple):
    """Something of the preferred and of the other response of each pair, arrays of one shape."""

    chosen: jax.Array
    rejected: jax.Array


class Preference(NamedTuple):
    """What a policy thinks of each pair."""

    loss: jax.Array  # float32, of each pair
    rewards: Pair  # implicit: β log π/π_ref, up to a constant of the prompt (DPO eq. 5)

    @property
    def margin(self) -> jax.Array:
        """Implicit reward of the chosen response over the rejected one's."""
        return self.rewards.chosen - self.rewards.rejected

    @property
    def correct(self) -> jax.Array:
        """1 where the chosen response has the higher implicit reward, as float32."""
        return (self.margin > 0).astype(jnp.float32)


def dpo(
    policy: Pair, reference: Pair, *, beta: float, loss: str, label_smoothing: float, lengths: Pair | None
) -> Preference:
    """DPO of each pair.

    Args:
      policy, reference: log-probabilities of the responses, summed over their tokens, nats.
      beta: how dear it is to leave the reference.
      loss: `sigmoid` (DPO eq. 7) or `ipo` (Azar et al. 2023 eq. 17).
      label_smoothing: share of pairs whose label is taken to be wrong: conservative DPO (Mitchell 2023); 0: none.
      lengths: tokens of the responses, by which log-probabilities are divided; `None`: sums, as in DPO. IPO's authors
        average.

    Raises `InputError` for an unknown loss, and for label smoothing outside [0, 0.5) or with ipo.
    """
    if loss not in LOSSES:
        raise InputError(f"dpo.loss={loss!r}; expected one of {', '.join(LOSSES)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss == "ipo"):
        raise InputError(f"dpo.label_smoothing={label_smoothing} with loss {loss}; expected [0, 0.5), with ipo 0")
    ratios = Pair(*(mine - theirs for mine, theirs in zip(policy, reference, strict=True)))
    if lengths is not None:
        ratios = Pair(*(ratio / jnp.maximum(length, 1) for ratio, length in zip(ratios, lengths, strict=True)))
    rewards = Pair(*(beta * ratio for ratio in ratios))  # DPO eq. 5
    margin = rewards.chosen - rewards.rejected
    if loss == "ipo":
        losses = jnp.square(ratios.chosen - ratios.rejected - 1 / (2 * beta))  # IPO eq. 17
    else:
        # DPO eq. 7; with smoothing, cDPO eq. 3
        losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    return Preference(losses, rewards)
