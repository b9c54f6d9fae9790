"""Grouped-query attention, one equation for multi-head (K=H), grouped and multi-query (K=1) attention; its masks."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gqa.nn import kernels
from gqa.nn.backend import backend
from gqa.nn.layers import Dropout, RMSNorm, dropped, linear, parameter
from gqa.sharding import constrain


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes, scaling and optional parts of one attention site."""

    d_model: int  # width of the activations, D
    num_heads: int  # query heads, H
    num_kv_heads: int  # key/value heads, K; divides H (GQA §2.2)
    head_dim: int  # width of a head, d
    scale: float  # factor on the scores; T5 folds 1/sqrt(d) into the query init and uses 1
    qkv_bias: bool  # biases on queries, keys and values (Qwen2)
    qk_norm_epsilon: float | None  # RMSNorm of each query and key head, one scale for all heads (Qwen3); None: none


@dataclasses.dataclass(frozen=True)
class AttentionInit:
    """Standard deviations of the four kernels' normal initialisation."""

    query: float
    key_value: float
    out: float


class GroupedQueryAttention(nnx.Module):
    """H query heads over K key/value heads: query head `h` reads key/value head `h // (H / K)` (GQA §2.2).

    Parameters: `query`, `key`, `value`, `out`; with biases `query_bias`, `key_bias`, `value_bias`; with norms
    `query_norm` and `key_norm`. What a site does not use is absent.
    """

    def __init__(self, shape: AttentionShape, init: AttentionInit, param_dtype, key):
        D, H, K, d = shape.d_model, shape.num_heads, shape.num_kv_heads, shape.head_dim
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.query = parameter(q_key, (D, H, d), ("embed", "heads", "head_dim"), init.query, param_dtype)
        self.key = parameter(k_key, (D, K, d), ("embed", "kv_heads", "head_dim"), init.key_value, param_dtype)
        self.value = parameter(v_key, (D, K, d), ("embed", "kv_heads", "head_dim"), init.key_value, param_dtype)
        self.out = parameter(o_key, (H, d, D), ("heads", "head_dim", "embed"), init.out, param_dtype)
        self.scale = shape.scale
        self.split_k = False  # set to True, a model decodes through `kernels.split_k_decode` where that applies
        self.qkv_bias = shape.qkv_bias
        if shape.qkv_bias:
            self.query_bias = parameter(None, (H, d), ("heads", "head_dim"), 0.0, param_dtype)
            self.key_bias = parameter(None, (K, d), ("kv_heads", "head_dim"), 0.0, param_dtype)
            self.value_bias = parameter(None, (K, d), ("kv_heads", "head_dim"), 0.0, param_dtype)
        self.qk_norm = shape.qk_norm_epsilon is not None
        if shape.qk_norm_epsilon is not None:
            self.query_norm = RMSNorm(d, shape.qk_norm_epsilon, param_dtype, "head_dim")
            self.key_norm = RMSNorm(d, shape.qk_norm_epsilon, param_dtype, "head_dim")

    def project_query(self, x_BTD: jax.Array) -> jax.Array:
        """Queries `[B, T, H, d]`, normalised where the site has norms."""
        query_BTHd = linear("BTD,DHd->BTHd", x_BTD, self.query, x_BTD.dtype)
        if self.qkv_bias:
            query_BTHd = _plus_bias(query_BTHd, self.query_bias[...])
        query_BTHd = self.query_norm(query_BTHd) if self.qk_norm else query_BTHd
        return constrain(query_BTHd, "batch", "length", "heads", "head_dim")

    def project_key_value(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys, normalised where the site has norms, and values, each `[B, K, S, d]`: the cache's layout."""
        key_BKSd = linear("BSD,DKd->BKSd", x_BSD, self.key, x_BSD.dtype)
        value_BKSd = linear("BSD,DKd->BKSd", x_BSD, self.value, x_BSD.dtype)
        if self.qkv_bias:
            key_BKSd = _plus_bias(key_BKSd, self.key_bias[...][:, None])
            value_BKSd = _plus_bias(value_BKSd, self.value_bias[...][:, None])
        key_BKSd = self.key_norm(key_BKSd) if self.qk_norm else key_BKSd
        axes = ("batch", "kv_heads", "kv_length", "head_dim")
        return constrain(key_BKSd, *axes), constrain(value_BKSd, *axes)

    def attend(
        self,
        query_BTHd: jax.Array,
        key_BKSd: jax.Array,
        value_BKSd: jax.Array,
        *,
        bias_HTS: jax.Array | None,
        mask_BTS: jax.Array | None,
        dropout: Dropout | None,
        site: int,
    ) -> jax.Array:
        """Attention output `[B, T, D]`."""
        heads_BTHd = self.attend_heads(
            query_BTHd, key_BKSd, value_BKSd, bias_HTS=bias_HTS, mask_BTS=mask_BTS, dropout=dropout, site=site
        )
        return self.project_out(heads_BTHd)

    def attend_heads(
        self, query_BTHd, key_BKSd, value_BKSd, *, bias_HTS, mask_BTS, dropout: Dropout | None, site: int
    ) -> jax.Array:
        """What each query head read, `[B, T, H, d]`; arguments as of `attend`."""
        return grouped_query_attention(
            query_BTHd * jnp.asarray(self.scale, query_BTHd.dtype),
            key_BKSd,
            value_BKSd,
            bias_HTS=bias_HTS,
            mask_BTS=mask_BTS,
            dropout=dropout,
            site=site,
            split_k=self.split_k,
        )

    def project_out(self, heads_BTHd: jax.Array) -> jax.Array:
        """The sum of all heads' outputs, `[B, T, D]`."""
        return linear("BTHd,HdD->BTD", heads_BTHd, self.out, heads_BTHd.dtype)


def _plus_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    # In float32, for the bias' gradient: a sum over all positions, which bfloat16 would stop early.
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def grouped_query_attention(
    query_BTHd: jax.Array,
    key_BKSd: jax.Array,
    value_BKSd: jax.Array,
    *,
    bias_HTS: jax.Array | None,
    mask_BTS: jax.Array | None,
    dropout: Dropout | None = None,
    site: int = 0,
    split_k: bool = False,
) -> jax.Array:
    """`softmax(q kᵀ + bias) v` with each key/value head shared by a group of G = H/K query heads (GQA §2.2).

    Args:
      query_BTHd: queries, scaled already.
      key_BKSd: keys; never repeated in memory.
      value_BKSd: values.
      bias_HTS: added to the scores, float32; `[B, H, T, S]` where rows differ.
      mask_BTS: bool, True where a query may attend; B and T may be 1.
      dropout: applied to the attention weights.
      site: the dropout site's number.
      split_k: allows the kernel of that name, which has no gradient.

    Returns:
      `[B, T, H, d]` in the queries' dtype; softmax is computed in float32.
    """
    kernel = choose_kernel(backend(), query_BTHd, key_BKSd, bias_HTS, dropout, split_k)
    if kernel is None:
        arguments = dict(bias_HTS=bias_HTS, mask_BTS=mask_BTS, dropout=dropout, site=site)
        return plain_attention(query_BTHd, key_BKSd, value_BKSd, **arguments)
    query_BTKGd, bias_KGTS = _grouped(query_BTHd, bias_HTS, key_BKSd.shape[1])
    return kernel(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS).reshape(query_BTHd.shape)


def choose_kernel(
    platform: str, query_BTHd, key_BKSd, bias_HTS, dropout: Dropout | None, split_k: bool
) -> Callable | None:
    """The kernel of `gqa.nn.kernels` for arguments of these shapes and dtypes; `None`: `plain_attention`.

    `platform` is `cpu`, `tpu`, `cuda` or another that has no kernels here.
    """
    T, d, S = query_BTHd.shape[1], query_BTHd.shape[3], key_BKSd.shape[2]
    long = T >= kernels.BLOCK  # few queries: turning the cache's keys for a kernel costs more than the scores
    if dropout is not None:  # none of them drops weights
        return None
    if platform == "cpu":
        return kernels.on_cpu
    if platform == "tpu" and long and bias_HTS is None and T % kernels.BLOCK == S % kernels.BLOCK == 0:
        return kernels.splash
    if platform == "cuda" and split_k and T == 1 and S >= kernels.SPLIT_K_LENGTH and d in kernels.SPLIT_K_HEAD_DIMS:
        return kernels.split_k_decode
    if platform == "cuda" and long and T % 2 == S % 2 == d % 8 == 0 and d <= 128 and query_BTHd.dtype in _HALF:
        return kernels.cudnn
    return None


_HALF = (jnp.bfloat16, jnp.float16)


def plain_attention(
    query_BTHd, key_BKSd, value_BKSd, *, bias_HTS, mask_BTS, dropout: Dropout | None = None, site: int = 0
) -> jax.Array:
    """`grouped_query_attention` as its equation says it: the reference of all kernels."""
    query_BTKGd, bias_KGTS = _grouped(query_BTHd, bias_HTS, key_BKSd.shape[1])
    scores_BKGTS = jnp.einsum("BTKGd,BKSd->BKGTS", query_BTKGd, key_BKSd, preferred_element_type=jnp.float32)
    scores_BKGTS = kernels.masked(scores_BKGTS, bias_KGTS, mask_BTS)
    weights_BKGTS = dropped(jax.nn.softmax(scores_BKGTS, axis=-1).astype(query_BTHd.dtype), dropout, site)
    return jnp.einsum("BKGTS,BKSd->BTKGd", weights_BKGTS, value_BKSd).reshape(query_BTHd.shape)


def _grouped(query_BTHd, bias_HTS, K: int) -> tuple[jax.Array, jax.Array | None]:
    """Queries and bias with their heads in groups."""
    B, T, H, d = query_BTHd.shape
    if bias_HTS is not None:
        *rows, _, _, S = bias_HTS.shape
        bias_HTS = bias_HTS.reshape(*rows, K, H // K, T, S)
    return query_BTHd.reshape(B, T, K, H // K, d), bias_HTS


# Masks: bool [B, T, S] (B or T may be 1), True where a query may attend; combine them with `&`.


def causal_mask(query_positions: jax.Array, key_positions_S: jax.Array) -> jax.Array:
    """A query sees keys at its own and earlier positions: `[1, T, S]`, or `[B, T, S]` of `[B, T]`."""
    return key_positions_S <= jnp.atleast_2d(query_positions)[:, :, None]


def sliding_window_mask(query_positions: jax.Array, key_positions_S: jax.Array, window: int) -> jax.Array:
    """A query sees keys fewer than `window` positions behind it (Mistral §2). Shapes as of `causal_mask`."""
    return jnp.atleast_2d(query_positions)[:, :, None] - key_positions_S < window


def segment_mask(query_segments_BT: jax.Array, key_segments_BS: jax.Array) -> jax.Array:
    """Documents packed in one row see only themselves; segment 0 is padding. `[B, T, S]`."""
    return query_segments_BT[:, :, None] == key_segments_BS[:, None, :]


def padding_mask(key_segments_BS: jax.Array) -> jax.Array:
    """Every query sees all keys that are not padding (segment 0). `[B, 1, S]`."""
    return (key_segments_BS != 0)[:, None, :]


def prefix_mask(causal_1TS: jax.Array, prefix_BS: jax.Array) -> jax.Array:
    """Causal, but every query also sees the prefix (`prefix_BS` True): prefix LM (Raffel et al. 2020 §3.2)."""
    return causal_1TS | prefix_BS[:, None, :]
