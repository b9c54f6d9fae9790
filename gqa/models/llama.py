"""Llama: a decoder with RoPE, SwiGLU, pre-normalisation and grouped-query attention (Llama 2 §2.2; Llama 3).

Its options make it Mistral (a sliding window), Qwen2 (biases) and Qwen3 (norms of queries and keys).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gqa.errors import InputError
from gqa.models.heads import KVHeads, check_kv_heads, check_sizes, per_layer_kv_heads
from gqa.models.stacks import apply_stacks, init_stacks, num_layers, unstack
from gqa.nn.attention import (
    AttentionInit,
    AttentionShape,
    GroupedQueryAttention,
    causal_mask,
    prefix_mask,
    segment_mask,
    sliding_window_mask,
)
from gqa.nn.cache import Cache, empty_cache, row_major
from gqa.nn.layers import ACTIVATIONS, Dropout, GatedMLP, RMSNorm, dropped, embed, logits, parameter, unembed
from gqa.nn.position import RopeScaling, rotary_angles, rotary_frequencies, rotate
from gqa.sharding import constrain

SITES = ("decoder_self",)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a Llama-like decoder."""

    vocab_size: int  # rows of the embedding, V
    d_model: int  # width of the activations, D
    num_heads: int  # query heads, H
    head_dim: int  # width of a head, d
    d_ff: int  # width of the gated MLP, F
    num_layers: int
    decoder_self_kv_heads: KVHeads  # key/value heads, one number or one per layer
    rope_theta: float  # base of the rotary frequencies
    rope_scaling: RopeScaling | None  # Llama 3's frequency scaling
    sliding_window: int | None  # tokens a query can look back, itself included (Mistral); None: all
    qkv_bias: bool  # biases on queries, keys and values (Qwen2)
    qk_norm: bool  # RMSNorm of each query and key head before RoPE (Qwen3)
    max_position: int  # context length the model was trained for, in tokens
    tied_logits: bool  # logits from the embedding instead of a kernel of their own
    activation: str  # of the gated MLP
    norm_epsilon: float
    dropout_rate: float
    dtype: str  # of activations and matrix products; softmax, norms and logits are float32
    param_dtype: str  # of the parameters; float32 masters in training
    scan_layers: bool  # scan over stacked layers instead of unrolling them
    remat: str  # what the backward pass recomputes: none, dots, full

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "num_layers")
        check_sizes(self, (*sizes, "sliding_window", "max_position"))
        check_kv_heads("decoder_self_kv_heads", self.decoder_self_kv_heads, self.num_heads, self.num_layers)
        if self.head_dim % 2:
            raise InputError(
                f"head_dim={self.head_dim} must be even for RoPE; nearest: {self.head_dim - 1}, {self.head_dim + 1}"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation={self.activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")

    def kv_heads(self, site: str) -> tuple[int, ...]:
        """Key/value heads of each layer at `site`, always `decoder_self`."""
        assert site in SITES, site
        return per_layer_kv_heads(self.decoder_self_kv_heads, self.num_layers)


class DecoderCache(NamedTuple):
    """What decoding keeps between steps; the list holds one entry per stack of layers."""

    self_attention: list[Cache]  # [L, B, K, S, d]
    index: jax.Array  # int32, tokens seen so far: a scalar, or [B] where rows differ


class DecoderLayer(nnx.Module):
    """Causal self-attention and SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, num_kv_heads: int, key):
        attention_key, mlp_key = jax.random.split(key)
        stddev = config.d_model**-0.5
        shape = AttentionShape(
            config.d_model,
            config.num_heads,
            num_kv_heads,
            config.head_dim,
            scale=config.head_dim**-0.5,
            qkv_bias=config.qkv_bias,
            qk_norm_epsilon=config.norm_epsilon if config.qk_norm else None,
        )
        # Outputs shrink with depth so that the residual stream does not grow (GPT-2 §2.3).
        out_stddev = stddev * (2 * config.num_layers) ** -0.5
        self.self_attention_norm = RMSNorm(config.d_model, config.norm_epsilon, config.param_dtype)
        init = AttentionInit(query=stddev, key_value=stddev, out=out_stddev)
        self.self_attention = GroupedQueryAttention(shape, init, config.param_dtype, attention_key)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_epsilon, config.param_dtype)
        self.mlp = GatedMLP(
            config.d_model,
            config.d_ff,
            activation=config.activation,
            stddev_in=stddev,
            stddev_out=out_stddev,
            param_dtype=config.param_dtype,
            key=mlp_key,
        )

    def __call__(self, x_BTD, cache: Cache | None, *, index, angles, mask_BTS, dropout: Dropout | None):
        """One layer; with a `cache`, new keys and values are written at `index` and all of it is attended to."""
        cos_BTd, sin_BTd = angles
        hidden = self.self_attention_norm(x_BTD)
        query, (key, value) = self.self_attention.project_query(hidden), self.self_attention.project_key_value(hidden)
        query = rotate(query, cos_BTd[:, :, None], sin_BTd[:, :, None])
        key = rotate(key, cos_BTd[:, None], sin_BTd[:, None])
        if cache is not None:
            cache = cache.append(key, value, index)
            key, value = cache.read(x_BTD.dtype)
        hidden = self.self_attention.attend(
            query, key, value, bias_HTS=None, mask_BTS=mask_BTS, dropout=dropout, site=0
        )
        x_BTD = x_BTD + dropped(hidden, dropout, 1)
        x_BTD = x_BTD + dropped(self.mlp(self.mlp_norm(x_BTD), dropout, 2), dropout, 3)
        return constrain(x_BTD, "batch", "length", "activation"), cache


class Llama(nnx.Module):
    """A Llama-like decoder, an immutable pytree: pass it to `jax.jit` and `jax.grad` as a value."""

    def __init__(self, config: LlamaConfig, key: jax.Array):
        embedding_key, decoder_key, logits_key = jax.random.split(key, 3)
        self.config = config
        table = (config.vocab_size, config.d_model)
        self.embedding = parameter(embedding_key, table, ("vocab", "embed"), config.d_model**-0.5, config.param_dtype)
        self.decoder = init_stacks(
            lambda num_kv_heads, layer_key: DecoderLayer(config, num_kv_heads, layer_key),
            config.kv_heads("decoder_self"),
            decoder_key,
        )
        self.decoder_norm = RMSNorm(config.d_model, config.norm_epsilon, config.param_dtype)
        if not config.tied_logits:
            self.logits = parameter(
                logits_key, table[::-1], ("embed", "vocab"), config.d_model**-0.5, config.param_dtype
            )

    def __call__(
        self,
        decoder_inputs_BT: jax.Array,
        *,
        decoder_segments_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits `[B, T, V]` float32 of every position.

        Args:
          decoder_inputs_BT: tokens.
          decoder_segments_BT: 0 on padding, 1, 2, … on packed documents; `None`: one document without padding.
          prefix_BT: True where a token belongs to a prefix that all of its document may see; `None`: causal.
          dropout_key: random key of dropout at `config.dropout_rate`; `None`: no dropout.
        """
        return self.unembed(
            self.features(
                decoder_inputs_BT,
                decoder_segments_BT=decoder_segments_BT,
                prefix_BT=prefix_BT,
                dropout_key=dropout_key,
            )
        )

    def features(
        self,
        decoder_inputs_BT: jax.Array,
        *,
        decoder_segments_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """What logits are read from, `[B, T, D]`: the last layer's outputs behind the last norm; arguments as above."""
        config = self.config
        dropout = None
        if dropout_key is not None and config.dropout_rate > 0:
            dropout = Dropout(config.dropout_rate, dropout_key)
        layer_fn = self.decoder_layer_fn(decoder_inputs_BT.shape[1], decoder_segments_BT, prefix_BT, dropout)
        x_BTD = self.embed(decoder_inputs_BT, dropout)
        x_BTD, _ = apply_stacks(layer_fn, self.decoder, x_BTD, None, scan=config.scan_layers, remat=config.remat)
        return self.decoder_norm(x_BTD)

    def decoder_layer_fn(self, T: int, decoder_segments_BT, prefix_BT=None, dropout: Dropout | None = None) -> Callable:
        """`(layer, x [B, T, D], None, number) -> (x, None)`: what applies a layer, in the model or on its own."""
        positions = jnp.arange(T)
        mask = self._causal_mask(positions, positions)
        if prefix_BT is not None:
            mask = prefix_mask(mask, prefix_BT)
        if decoder_segments_BT is not None:
            mask = mask & segment_mask(decoder_segments_BT, decoder_segments_BT)
        # RoPE sees differences of positions only, so packed documents need no positions of their own.
        angles = self._angles(positions[None])

        def layer_fn(layer, x, _, number):
            # The stack's own site (embedding) uses the key unfolded; layers start at 1000.
            folded = dropout and Dropout(dropout.rate, jax.random.fold_in(dropout.key, 1000 + number))
            return layer(x, None, index=None, angles=angles, mask_BTS=mask, dropout=folded)

        return layer_fn

    def init_cache(self, batch_size: int, max_length: int, dtype: str | None = None) -> DecoderCache:
        """An empty cache for `max_length` tokens of `batch_size` rows.

        `dtype` is the cache's: int8 quantises it, `None`: `config.dtype`.
        """
        config = self.config
        caches = [
            empty_cache(
                num_layers(stack),
                batch_size,
                stack.self_attention.key.shape[-2],
                max_length,
                config.head_dim,
                dtype=dtype or config.dtype,
            )
            for stack in self.decoder
        ]
        return DecoderCache(caches, jnp.zeros((), jnp.int32))

    def decode_step(self, tokens_BT: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """Logits `[B, T, V]` of `T` further tokens (a whole prompt is a prefill), and the cache with them in it.

        Prompts of unequal length are padded on the right; set each row's `index` to its own length afterwards: a row
        never sees what lies behind its index, and overwrites it.
        """
        config = self.config
        T, S = tokens_BT.shape[1], cache.self_attention[0].key.shape[-2]
        positions = cache.index[..., None] + jnp.arange(T)
        mask = self._causal_mask(positions, jnp.arange(S))
        angles = self._angles(jnp.atleast_2d(positions))

        def layer_fn(layer, x, self_cache, number):
            return layer(x, self_cache, index=cache.index, angles=angles, mask_BTS=mask, dropout=None)

        x_BTD = self.embed(tokens_BT, None)
        x_BTD, caches = apply_stacks(
            layer_fn, self.decoder, x_BTD, cache.self_attention, scan=config.scan_layers, remat="none"
        )
        return self.unembed(self.decoder_norm(x_BTD)), DecoderCache(row_major(caches), cache.index + T)

    def unstacked(self) -> "Llama":
        """The same model with one layer per stack: the form for decoding."""
        model = jax.tree.map(lambda leaf: leaf, self)
        model.decoder = unstack(self.decoder)
        return model

    def _causal_mask(self, query_positions, key_positions) -> jax.Array:
        mask = causal_mask(query_positions, key_positions)
        if self.config.sliding_window is not None:
            mask = mask & sliding_window_mask(query_positions, key_positions, self.config.sliding_window)
        return mask

    def _angles(self, positions_BT):
        config = self.config
        return rotary_angles(positions_BT, rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))

    def embed(self, tokens_BT, dropout: Dropout | None = None) -> jax.Array:
        """What the first layer reads, `[B, T, D]`."""
        x_BTD = embed(self.embedding, tokens_BT, self.config.dtype)
        return constrain(dropped(x_BTD, dropout, 0), "batch", "length", "activation")

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Logits `[B, T, V]` float32 of `features`."""
        if self.config.tied_logits:
            logits_BTV = unembed(self.embedding, x_BTD)
        else:
            logits_BTV = logits(x_BTD, self.logits)
        return constrain(logits_BTV, "batch", "length", "vocab")


_LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    d_model=4096,
    num_heads=32,
    head_dim=128,
    d_ff=11008,
    num_layers=32,
    decoder_self_kv_heads=32,
    rope_theta=10000.0,
    rope_scaling=None,
    sliding_window=None,
    qkv_bias=False,
    qk_norm=False,
    max_position=4096,
    tied_logits=False,
    activation="silu",
    norm_epsilon=1e-5,
    dropout_rate=0.0,
    dtype="bfloat16",
    param_dtype="float32",
    scan_layers=True,
    remat="dots",
)
_LLAMA_3_8B = dataclasses.replace(
    _LLAMA_2_7B,
    vocab_size=128256,
    d_ff=14336,
    decoder_self_kv_heads=8,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_position=8192
    ),
    max_position=131072,
)

# Public sizes (Llama 2 table 1; Llama 3.1 with its frequency scaling) and one for tests.
SIZES: dict[str, LlamaConfig] = {
    "llama_mini": dataclasses.replace(
        _LLAMA_2_7B,
        vocab_size=256,
        d_model=64,
        num_heads=4,
        head_dim=16,
        d_ff=96,
        num_layers=2,
        decoder_self_kv_heads=4,
        dtype="float32",
        remat="none",
    ),
    "llama_2_7b": _LLAMA_2_7B,
    "llama_2_13b": dataclasses.replace(
        _LLAMA_2_7B, d_model=5120, num_heads=40, d_ff=13824, num_layers=40, decoder_self_kv_heads=40
    ),
    "llama_2_70b": dataclasses.replace(
        _LLAMA_2_7B, d_model=8192, num_heads=64, d_ff=28672, num_layers=80, decoder_self_kv_heads=8
    ),
    "llama_3_8b": _LLAMA_3_8B,
    "llama_3_70b": dataclasses.replace(_LLAMA_3_8B, d_model=8192, num_heads=64, d_ff=28672, num_layers=80),
}
