"""A reward model: a decoder whose features at a response's last token become one number (Llama 2 §3.2.2)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from gqa.models.llama import Llama, LlamaConfig
from gqa.nn.layers import parameter


class RewardModel(nnx.Module):
    """A decoder and the head that reads its features in the place of logits; a pytree as all models are."""

    def __init__(self, backbone: Llama, head: nnx.Param):
        self.backbone = backbone
        self.head = head  # [D]

    @property
    def config(self) -> LlamaConfig:
        """The decoder's."""
        return self.backbone.config

    def __call__(self, batch: Mapping[str, jax.Array], dropout_key: jax.Array | None = None) -> jax.Array:
        """The score after each token, `[B, T]` float32; that of a response stands at its last one.

        `batch` has `decoder_inputs` and `targets_segments` `[B, T]`; `dropout_key` as of `Llama`.
        """
        features_BTD = self.backbone.features(
            batch["decoder_inputs"], decoder_segments_BT=batch["targets_segments"], dropout_key=dropout_key
        )
        return features_BTD.astype(jnp.float32) @ self.head[...].astype(jnp.float32)

    def at_end(self, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """The score of each row at its last token, `[B]` float32; padding is on the right."""
        scores_BT = self({"decoder_inputs": tokens_BT, "targets_segments": None})
        return jnp.take_along_axis(scores_BT, jnp.maximum(lengths_B - 1, 0)[:, None], axis=1)[:, 0]


def with_head(backbone: Llama, key: jax.Array) -> RewardModel:
    """A reward model on a decoder, its head drawn at random with variance 1 / (D + 1), as in TRL."""
    config = backbone.config
    stddev = (config.d_model + 1) ** -0.5
    return RewardModel(backbone, parameter(key, (config.d_model,), ("embed",), stddev, config.param_dtype))
