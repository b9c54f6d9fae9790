"""The ranking loss of reward models, and what Llama 2 makes of their scores."""

import jax
import jax.numpy as jnp

# Llama 2 table 27, by rating from the least distinct: what a chosen response's score should be higher by.
SMALL_MARGINS = (0.0, 1 / 3, 2 / 3, 1.0)
LARGE_MARGINS = (0.0, 1.0, 2.0, 3.0)
SAFETY_GATE = 0.15  # Llama 2 §3.2.3: a response below it is judged by its safety


def ranking_loss(chosen: jax.Array, rejected: jax.Array, margins: jax.Array | float) -> jax.Array:
    """`-log σ(r_chosen - r_rejected - m)` of each pair (Llama 2 eq. 2; with m = 0, eq. 1: Bradley and Terry)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margins)


def combined_reward(helpfulness: jax.Array, safety: jax.Array, is_safety_prompt: jax.Array) -> jax.Array:
    """Llama 2's R_c before whitening, as a logit.

    Args:
      helpfulness, safety: scores of the two reward models as they come, without a sigmoid: logit(R) of the paper's R.
      is_safety_prompt: True where the prompt is tagged as one that could elicit unsafe responses.
    """
    # Llama 2 §3.2.3: R_c = R_s where tagged or R_s < 0.15, else R_h; then logit(R_c), which undoes the sigmoid.
    unsafe = safety < jnp.log(SAFETY_GATE / (1 - SAFETY_GATE))
    return jnp.where(is_safety_prompt | unsafe, safety, helpfulness)
