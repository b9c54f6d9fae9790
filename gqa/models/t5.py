"""T5.1.1: encoder-decoder with gated GELU, relative position bias and unscaled scores; K is set per site and layer."""

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
    padding_mask,
    segment_mask,
)
from gqa.nn.cache import Cache, Int8KVCache, KVCache, empty_cache, filled_cache, row_major
from gqa.nn.layers import ACTIVATIONS, Dropout, GatedMLP, RMSNorm, dropped, embed, logits, parameter, unembed
from gqa.nn.position import RelativePositionBias
from gqa.sharding import constrain

SITES = ("encoder_self", "decoder_self", "cross")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture of a T5.1.1 model (Raffel et al. 2020; GQA §3.1)."""

    vocab_size: int  # rows of the embedding, V
    d_model: int  # width of the activations, D
    num_heads: int  # query heads of every site, H
    head_dim: int  # width of a head, d
    d_ff: int  # width of the gated MLP, F
    num_encoder_layers: int
    num_decoder_layers: int
    encoder_self_kv_heads: KVHeads  # key/value heads of the encoder's self-attention; one number or one per layer
    decoder_self_kv_heads: KVHeads  # key/value heads of the decoder's self-attention (GQA §2.2)
    cross_kv_heads: KVHeads  # key/value heads of the cross-attention
    relative_buckets: int  # buckets of the relative position bias
    relative_max_distance: int  # distance from which all positions share the last bucket
    relative_bias_per_layer: bool  # every layer its own table (T5X's scanned checkpoints) instead of one for the stack
    tied_logits: bool  # logits from the embedding, scaled by 1/sqrt(D), instead of a kernel of their own
    activation: str  # of the gated MLP
    norm_epsilon: float
    dropout_rate: float  # 0 in pre-training, 0.1 in fine-tuning (GQA §3.1)
    dtype: str  # of activations and matrix products; softmax, norms and logits are float32
    param_dtype: str  # of the parameters; float32 masters in training
    scan_layers: bool  # scan over stacked layers instead of unrolling them
    remat: str  # what the backward pass recomputes: none, dots, full

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "num_encoder_layers", "num_decoder_layers")
        check_sizes(self, sizes)
        for site, layers in zip(SITES, (self.num_encoder_layers, *(self.num_decoder_layers,) * 2), strict=True):
            check_kv_heads(f"{site}_kv_heads", getattr(self, f"{site}_kv_heads"), self.num_heads, layers)
        if self.relative_buckets < 4 or self.relative_max_distance <= self.relative_buckets // 2:
            raise InputError(
                f"relative_buckets={self.relative_buckets} with relative_max_distance={self.relative_max_distance}; "
                "expected at least 4 buckets and a distance above half of them (T5.1.1: 32, 128)"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation={self.activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")

    def kv_heads(self, site: str) -> tuple[int, ...]:
        """Key/value heads of each layer at `site`, one of `encoder_self`, `decoder_self`, `cross`."""
        layers = self.num_encoder_layers if site == "encoder_self" else self.num_decoder_layers
        return per_layer_kv_heads(getattr(self, f"{site}_kv_heads"), layers)


class DecoderCache(NamedTuple):
    """What decoding keeps between steps; lists hold one entry per stack of layers."""

    self_attention: list[Cache]  # [L, B, K, S, d], S the most targets
    cross_attention: list[Cache]  # [L, B, K, S, d], S the inputs' length; computed once
    cross_mask_B1S: jax.Array | None  # True on inputs that are not padding
    index: jax.Array  # int32, targets decoded so far: a scalar, or [B] where rows differ


def _attention(config: T5Config, num_kv_heads: int, key) -> GroupedQueryAttention:
    # T5 folds 1/sqrt(d) into the query init: no scaling of the scores.
    shape = AttentionShape(
        config.d_model,
        config.num_heads,
        num_kv_heads,
        config.head_dim,
        scale=1.0,
        qkv_bias=False,
        qk_norm_epsilon=None,
    )
    init = AttentionInit(
        query=(config.d_model * config.head_dim) ** -0.5,
        key_value=config.d_model**-0.5,
        out=(config.num_heads * config.head_dim) ** -0.5,
    )
    return GroupedQueryAttention(shape, init, config.param_dtype, key)


def _mlp(config: T5Config, key) -> GatedMLP:
    return GatedMLP(
        config.d_model,
        config.d_ff,
        activation=config.activation,
        stddev_in=config.d_model**-0.5,
        stddev_out=config.d_ff**-0.5,
        param_dtype=config.param_dtype,
        key=key,
    )


def _relative_bias(config: T5Config, bidirectional: bool, key) -> RelativePositionBias:
    return RelativePositionBias(
        config.num_heads,
        num_buckets=config.relative_buckets,
        max_distance=config.relative_max_distance,
        bidirectional=bidirectional,
        stddev=config.d_model**-0.5,
        param_dtype=config.param_dtype,
        key=key,
    )


def _norm(config: T5Config) -> RMSNorm:
    return RMSNorm(config.d_model, config.norm_epsilon, config.param_dtype)


class EncoderLayer(nnx.Module):
    """Self-attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: T5Config, num_kv_heads: int, key):
        attention_key, mlp_key, bias_key = jax.random.split(key, 3)
        self.self_attention_norm = _norm(config)
        self.self_attention = _attention(config, num_kv_heads, attention_key)
        if config.relative_bias_per_layer:
            self.relative_bias = _relative_bias(config, True, bias_key)
        self.mlp_norm = _norm(config)
        self.mlp = _mlp(config, mlp_key)

    def __call__(self, x_BTD, *, bias_HTS, mask_BTS, dropout: Dropout | None):
        hidden = self.self_attention_norm(x_BTD)
        query, (key, value) = self.self_attention.project_query(hidden), self.self_attention.project_key_value(hidden)
        hidden = self.self_attention.attend(
            query, key, value, bias_HTS=bias_HTS, mask_BTS=mask_BTS, dropout=dropout, site=0
        )
        x_BTD = x_BTD + dropped(hidden, dropout, 1)
        x_BTD = x_BTD + dropped(self.mlp(self.mlp_norm(x_BTD), dropout, 2), dropout, 3)
        return constrain(x_BTD, "batch", "length", "activation")


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: T5Config, num_kv_heads: tuple[int, int], key):
        self_key, cross_key, mlp_key, bias_key = jax.random.split(key, 4)
        self_kv_heads, cross_kv_heads = num_kv_heads
        self.self_attention_norm = _norm(config)
        self.self_attention = _attention(config, self_kv_heads, self_key)
        if config.relative_bias_per_layer:
            self.relative_bias = _relative_bias(config, False, bias_key)
        self.cross_attention_norm = _norm(config)
        self.cross_attention = _attention(config, cross_kv_heads, cross_key)
        self.mlp_norm = _norm(config)
        self.mlp = _mlp(config, mlp_key)

    def __call__(self, x_BTD, cross: Cache, cache: Cache | None, *, index, bias_HTS, mask_BTS, cross_mask_BTS, dropout):
        """One layer; with a `cache`, new keys and values are written at `index` and all of it is attended to."""
        hidden = self.self_attention_norm(x_BTD)
        query, (key, value) = self.self_attention.project_query(hidden), self.self_attention.project_key_value(hidden)
        if cache is not None:
            cache = cache.append(key, value, index)
            key, value = cache.read(x_BTD.dtype)
        hidden = self.self_attention.attend(
            query, key, value, bias_HTS=bias_HTS, mask_BTS=mask_BTS, dropout=dropout, site=0
        )
        x_BTD = x_BTD + dropped(hidden, dropout, 1)
        # Rows that share an input (its beams) are further queries of it: its keys and values are not repeated.
        hidden = self.cross_attention_norm(x_BTD).reshape(cross.key.shape[0], -1, x_BTD.shape[-1])
        if isinstance(cross, Int8KVCache):
            # What a decoding loop does not change XLA would turn into floats before the loop.
            hidden, cross = jax.lax.optimization_barrier((hidden, cross))
        query = self.cross_attention.project_query(hidden)
        hidden = self.cross_attention.attend(
            query, *cross.read(x_BTD.dtype), bias_HTS=None, mask_BTS=cross_mask_BTS, dropout=dropout, site=2
        )
        x_BTD = x_BTD + dropped(hidden.reshape(x_BTD.shape), dropout, 3)
        x_BTD = x_BTD + dropped(self.mlp(self.mlp_norm(x_BTD), dropout, 4), dropout, 5)
        return constrain(x_BTD, "batch", "length", "activation"), cache


class T5(nnx.Module):
    """A T5.1.1 encoder-decoder, an immutable pytree: pass it to `jax.jit` and `jax.grad` as a value."""

    def __init__(self, config: T5Config, key: jax.Array):
        embedding_key, encoder_key, decoder_key, encoder_bias_key, decoder_bias_key, logits_key = jax.random.split(
            key, 6
        )
        self.config = config
        self.embedding = parameter(
            embedding_key, (config.vocab_size, config.d_model), ("vocab", "embed"), 1.0, config.param_dtype
        )
        if not config.relative_bias_per_layer:
            self.encoder_bias = _relative_bias(config, True, encoder_bias_key)
        self.encoder = init_stacks(
            lambda num_kv_heads, layer_key: EncoderLayer(config, num_kv_heads, layer_key),
            config.kv_heads("encoder_self"),
            encoder_key,
        )
        self.encoder_norm = _norm(config)
        if not config.relative_bias_per_layer:
            self.decoder_bias = _relative_bias(config, False, decoder_bias_key)
        self.decoder = init_stacks(
            lambda num_kv_heads, layer_key: DecoderLayer(config, num_kv_heads, layer_key),
            list(zip(config.kv_heads("decoder_self"), config.kv_heads("cross"), strict=True)),
            decoder_key,
        )
        self.decoder_norm = _norm(config)
        if not config.tied_logits:
            self.logits = parameter(
                logits_key,
                (config.d_model, config.vocab_size),
                ("embed", "vocab"),
                config.d_model**-0.5,
                config.param_dtype,
            )

    def __call__(
        self,
        inputs_BS: jax.Array,
        decoder_inputs_BT: jax.Array,
        *,
        inputs_segments_BS: jax.Array | None = None,
        decoder_segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits `[B, T, V]` float32 of every target position.

        Args:
          inputs_BS: encoder tokens.
          decoder_inputs_BT: targets shifted right.
          inputs_segments_BS: 0 on padding, 1, 2, … on packed documents; `None`: one document without padding.
          decoder_segments_BT: the same for the decoder; `None`: one document that reads all inputs but padding.
          dropout_key: random key of dropout at `config.dropout_rate`; `None`: no dropout.
        """
        encoder_dropout = decoder_dropout = None
        if dropout_key is not None and self.config.dropout_rate > 0:
            keys = jax.random.split(dropout_key)
            encoder_dropout, decoder_dropout = (Dropout(self.config.dropout_rate, key) for key in keys)
        encoded_BSD = self.encode(inputs_BS, inputs_segments_BS, encoder_dropout)
        return self.decode(encoded_BSD, decoder_inputs_BT, inputs_segments_BS, decoder_segments_BT, decoder_dropout)

    def encode(self, inputs_BS, inputs_segments_BS=None, dropout: Dropout | None = None) -> jax.Array:
        """Encoder outputs `[B, S, D]`."""
        config = self.config
        layer_fn = self.encoder_layer_fn(inputs_BS.shape[1], inputs_segments_BS, dropout)
        x_BSD = self.embed(inputs_BS, dropout)
        x_BSD, _ = apply_stacks(layer_fn, self.encoder, x_BSD, None, scan=config.scan_layers, remat=config.remat)
        return dropped(self.encoder_norm(x_BSD), dropout, 1)

    def encoder_layer_fn(self, S: int, inputs_segments_BS, dropout: Dropout | None = None) -> Callable:
        """`(layer, x [B, S, D], None, number) -> (x, None)`: what applies a layer, in the encoder or on its own."""
        mask_BSS = None if inputs_segments_BS is None else segment_mask(inputs_segments_BS, inputs_segments_BS)
        bias = self._layer_bias("encoder_bias", S, S, 0)

        def layer_fn(layer, x, _, number):
            return layer(x, bias_HTS=bias(layer), mask_BTS=mask_BSS, dropout=_fold(dropout, number)), None

        return layer_fn

    def decode(
        self, encoded_BSD, decoder_inputs_BT, inputs_segments_BS=None, decoder_segments_BT=None, dropout=None
    ) -> jax.Array:
        """Logits `[B, T, V]` float32 of all positions at once."""
        config = self.config
        layer_fn = self.decoder_layer_fn(
            decoder_inputs_BT.shape[1], encoded_BSD, inputs_segments_BS, decoder_segments_BT, dropout
        )
        x_BTD = self.embed(decoder_inputs_BT, dropout)
        x_BTD, _ = apply_stacks(layer_fn, self.decoder, x_BTD, None, scan=config.scan_layers, remat=config.remat)
        return self._logits(x_BTD, dropout)

    def decoder_layer_fn(
        self, T: int, encoded_BSD, inputs_segments_BS, decoder_segments_BT, dropout: Dropout | None = None
    ) -> Callable:
        """`(layer, x [B, T, D], None, number) -> (x, None)`: what applies a layer of the decoder to whole targets."""
        positions = jnp.arange(T)
        mask_BTT = causal_mask(positions, positions)
        cross_mask_BTS = None if inputs_segments_BS is None else padding_mask(inputs_segments_BS)
        if decoder_segments_BT is not None:
            mask_BTT = mask_BTT & segment_mask(decoder_segments_BT, decoder_segments_BT)
            if inputs_segments_BS is not None:
                cross_mask_BTS = segment_mask(decoder_segments_BT, inputs_segments_BS)
        bias = self._layer_bias("decoder_bias", T, T, 0)

        def layer_fn(layer, x, _, number):
            cross = KVCache(*layer.cross_attention.project_key_value(encoded_BSD))
            masks = dict(bias_HTS=bias(layer), mask_BTS=mask_BTT, cross_mask_BTS=cross_mask_BTS)
            return layer(x, cross, None, index=None, dropout=_fold(dropout, number), **masks)

        return layer_fn

    def init_cache(self, inputs_BS, inputs_segments_BS, max_targets: int, dtype: str | None = None) -> DecoderCache:
        """Encodes the inputs and prepares decoding of up to `max_targets` tokens.

        `dtype` is the cache's: int8 quantises it, `None`: `config.dtype`.
        """
        config = self.config
        encoded_BSD = self.encode(inputs_BS, inputs_segments_BS)
        self_caches, cross_caches = [], []
        for stack in self.decoder:
            L, B, K = num_layers(stack), inputs_BS.shape[0], stack.self_attention.key.shape[-2]
            self_caches.append(empty_cache(L, B, K, max_targets, config.head_dim, dtype=dtype or config.dtype))
            project = lambda layer: layer.cross_attention.project_key_value(encoded_BSD)  # noqa: E731
            cross_caches.append(filled_cache(*jax.lax.map(project, stack), dtype or config.dtype))
        mask = None if inputs_segments_BS is None else padding_mask(inputs_segments_BS)
        return DecoderCache(self_caches, cross_caches, mask, jnp.zeros((), jnp.int32))

    def decode_step(self, tokens_BT: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """Logits `[B, T, V]` of `T` further decoder inputs, and the cache with them in it.

        Self-attention may have a multiple of the rows that cross-attention has: those that share an input, in turn.
        """
        config = self.config
        T, S = tokens_BT.shape[1], cache.self_attention[0].key.shape[-2]
        mask_BTS = causal_mask(cache.index[..., None] + jnp.arange(T), jnp.arange(S))
        x_BTD = self.embed(tokens_BT, None)
        bias = self._layer_bias("decoder_bias", T, S, cache.index)

        def layer_fn(layer, x, caches, number):
            self_cache, cross = caches
            masks = dict(bias_HTS=bias(layer), mask_BTS=mask_BTS, cross_mask_BTS=cache.cross_mask_B1S)
            return layer(x, cross, self_cache, index=cache.index, dropout=None, **masks)

        caches = list(zip(cache.self_attention, cache.cross_attention, strict=True))
        x_BTD, self_caches = apply_stacks(layer_fn, self.decoder, x_BTD, caches, scan=config.scan_layers, remat="none")
        return self._logits(x_BTD, None), cache._replace(self_attention=row_major(self_caches), index=cache.index + T)

    def unstacked(self) -> "T5":
        """The same model with one layer per stack: the form for decoding."""
        model = jax.tree.map(lambda leaf: leaf, self)
        model.encoder, model.decoder = unstack(self.encoder), unstack(self.decoder)
        return model

    def _layer_bias(self, shared: str, *positions) -> Callable:
        """A function from a layer to its bias `[H, T, S]`; the table that layers share is read once, not by each."""
        if self.config.relative_bias_per_layer:
            return lambda layer: layer.relative_bias(*positions)
        bias_HTS = getattr(self, shared)(*positions)
        return lambda layer: bias_HTS

    def embed(self, tokens_BT, dropout: Dropout | None = None) -> jax.Array:
        """What the first layer of either side reads, `[B, T, D]`."""
        x_BTD = embed(self.embedding, tokens_BT, self.config.dtype)
        return constrain(dropped(x_BTD, dropout, 0), "batch", "length", "activation")

    def _logits(self, x_BTD, dropout: Dropout | None) -> jax.Array:
        x_BTD = dropped(self.decoder_norm(x_BTD), dropout, 1)
        if self.config.tied_logits:
            x_BTD = x_BTD * jnp.asarray(self.config.d_model**-0.5, x_BTD.dtype)
            logits_BTV = unembed(self.embedding, x_BTD)
        else:
            logits_BTV = logits(x_BTD, self.logits)
        return constrain(logits_BTV, "batch", "length", "vocab")


def _fold(dropout: Dropout | None, number: jax.Array) -> Dropout | None:
    # Sites of the stack itself (embedding, final norm) use the key unfolded; layers start at 1000.
    return dropout and Dropout(dropout.rate, jax.random.fold_in(dropout.key, 1000 + number))


def _t5_1_1(d_model: int, num_heads: int, num_layers: int, d_ff: int) -> T5Config:
    return T5Config(
        vocab_size=32128,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=64,
        d_ff=d_ff,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        encoder_self_kv_heads=num_heads,
        decoder_self_kv_heads=num_heads,
        cross_kv_heads=num_heads,
        relative_buckets=32,
        relative_max_distance=128,
        relative_bias_per_layer=False,
        tied_logits=False,
        activation="gelu_new",
        norm_epsilon=1e-6,
        dropout_rate=0.0,
        dtype="bfloat16",
        param_dtype="float32",
        scan_layers=True,
        remat="dots",
    )


# T5.1.1's public sizes (papers: emb / heads / layers / mlp) and one for tests.
SIZES: dict[str, T5Config] = {
    "t5_1_1_mini": dataclasses.replace(
        _t5_1_1(d_model=64, num_heads=4, num_layers=2, d_ff=96),
        vocab_size=256,
        head_dim=16,
        dtype="float32",
        remat="none",
    ),
    "t5_1_1_small": _t5_1_1(d_model=512, num_heads=6, num_layers=8, d_ff=1024),
    "t5_1_1_base": _t5_1_1(d_model=768, num_heads=12, num_layers=12, d_ff=2048),
    "t5_1_1_large": _t5_1_1(d_model=1024, num_heads=16, num_layers=24, d_ff=2816),
    "t5_1_1_xl": _t5_1_1(d_model=2048, num_heads=32, num_layers=24, d_ff=5120),
    "t5_1_1_xxl": _t5_1_1(d_model=4096, num_heads=64, num_layers=24, d_ff=10240),
}
