"""Grouped-query attention, one equation for multi-head (K=H), grouped and multi-query (K=1) attention; its masks."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from gqa.nn.layers import Dropout, RMSNorm, dropped, linear, parameter
from gqa.sharding import constrain

MASKED_SCORE = -1e30  # finite: a query that may attend to nothing (padding) stays finite too


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
            query_BTHd += self.query_bias[...].astype(query_BTHd.dtype)
        query_BTHd = self.query_norm(query_BTHd) if self.qk_norm else query_BTHd
        return constrain(query_BTHd, "batch", "length", "heads", "head_dim")

    def project_key_value(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys, normalised where the site has norms, and values, each `[B, K, S, d]`: the cache's layout."""
        key_BKSd = linear("BSD,DKd->BKSd", x_BSD, self.key, x_BSD.dtype)
        value_BKSd = linear("BSD,DKd->BKSd", x_BSD, self.value, x_BSD.dtype)
        if self.qkv_bias:
            key_BKSd += self.key_bias[...].astype(key_BKSd.dtype)[:, None]
            value_BKSd += self.value_bias[...].astype(value_BKSd.dtype)[:, None]
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
        )

    def project_out(self, heads_BTHd: jax.Array) -> jax.Array:
        """The sum of all heads' outputs, `[B, T, D]`."""
        return linear("BTHd,HdD->BTD", heads_BTHd, self.out, heads_BTHd.dtype)


def grouped_query_attention(
    query_BTHd: jax.Array,
    key_BKSd: jax.Array,
    value_BKSd: jax.Array,
    *,
    bias_HTS: jax.Array | None,
    mask_BTS: jax.Array | None,
    dropout: Dropout | None = None,
    site: int = 0,
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

    Returns:
      `[B, T, H, d]` in the queries' dtype; softmax is computed in float32.
    """
    B, T, H, d = query_BTHd.shape
    K = key_BKSd.shape[1]
    query_BTKGd = query_BTHd.reshape(B, T, K, H // K, d)
    bias_KGTS = bias_HTS
    if bias_HTS is not None:
        *rows, _, _, S = bias_HTS.shape
        bias_KGTS = bias_HTS.reshape(*rows, K, H // K, T, S)
    if dropout is None and jax.default_backend() == "cpu":
        return _attention_on_cpu(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS).reshape(B, T, H, d)
    scores_BKGTS = jnp.einsum("BTKGd,BKSd->BKGTS", query_BTKGd, key_BKSd, preferred_element_type=jnp.float32)
    scores_BKGTS = _masked(scores_BKGTS, bias_KGTS, mask_BTS)
    weights_BKGTS = dropped(jax.nn.softmax(scores_BKGTS, axis=-1).astype(query_BTHd.dtype), dropout, site)
    return jnp.einsum("BKGTS,BKSd->BTKGd", weights_BKGTS, value_BKSd).reshape(B, T, H, d)


def _masked(scores_BKGTS, bias_KGTS, mask_BTS) -> jax.Array:
    if bias_KGTS is not None:
        scores_BKGTS += bias_KGTS
    if mask_BTS is not None:
        # Added, not selected: XLA:CPU does not vectorise a selection inside the softmax.
        scores_BKGTS += jnp.where(mask_BTS, 0.0, MASKED_SCORE)[:, None, None]
    return scores_BKGTS


# The same equation as XLA:CPU runs it fastest. The queries of a group are the R = G * T rows of one matrix: products
# with more than two dimensions beside the batch's turn and copy scores and weights, the largest arrays. And automatic
# differentiation adds a sum over a leading axis and products that miss the fast kernel. Forward and backward in
# float32, two cores: B=32, H=8, T=S=128, d=32 25 ms (40 ms with the general products); B=8, T=S=512 128 ms (220 ms).


@jax.custom_vjp
def _attention_on_cpu(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS):
    return _attention_on_cpu_forward(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS)[0]


def _attention_on_cpu_forward(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS):
    B, T, K, G, _ = query_BTKGd.shape
    query_BKRd = _rows(query_BTKGd)
    scores_BKRS = jnp.einsum("BKRd,BKSd->BKRS", query_BKRd, key_BKSd, preferred_element_type=jnp.float32)
    scores_BKGTS = _masked(scores_BKRS.reshape(B, K, G, T, -1), bias_KGTS, mask_BTS)
    weights_BKRS = jax.nn.softmax(scores_BKGTS, axis=-1).reshape(scores_BKRS.shape)
    out_BKRd = jnp.einsum("BKRS,BKSd->BKRd", weights_BKRS.astype(value_BKSd.dtype), value_BKSd)
    return _from_rows(out_BKRd, query_BTKGd.shape), (query_BKRd, key_BKSd, value_BKSd, weights_BKRS, bias_KGTS)


def _attention_on_cpu_backward(residuals, gradient_BTKGd):
    query_BKRd, key_BKSd, value_BKSd, weights_BKRS, bias_KGTS = residuals
    gradient_BKRd = _rows(gradient_BTKGd)
    of_weights = jnp.einsum("BKRd,BKSd->BKRS", gradient_BKRd, value_BKSd, preferred_element_type=jnp.float32)
    of_scores = weights_BKRS * (of_weights - (weights_BKRS * of_weights).sum(-1, keepdims=True))
    narrow_weights, narrow_scores = weights_BKRS.astype(value_BKSd.dtype), of_scores.astype(value_BKSd.dtype)
    # Computed with d in front, then turned: the direct products miss the fast kernel.
    barrier = jax.lax.optimization_barrier
    of_value = barrier(jnp.einsum("BKRd,BKRS->BKdS", gradient_BKRd, narrow_weights)).swapaxes(2, 3)
    of_key = barrier(jnp.einsum("BKRd,BKRS->BKdS", query_BKRd, narrow_scores)).swapaxes(2, 3)
    of_query = _from_rows(jnp.einsum("BKRS,BKSd->BKRd", narrow_scores, key_BKSd), gradient_BTKGd.shape)
    of_bias = None
    if bias_KGTS is not None:
        # A sum over the leading axis as a product: 40 times faster.
        flat = of_scores.reshape(of_scores.shape[0], -1)
        of_bias = (jnp.ones((1, flat.shape[0])) @ flat).reshape(bias_KGTS.shape)
    return of_query, of_key, of_value, of_bias, None


def _rows(x_BTKGd) -> jax.Array:
    B, T, K, G, d = x_BTKGd.shape
    return x_BTKGd.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)


def _from_rows(x_BKRd, shape: tuple[int, ...]) -> jax.Array:
    B, T, K, G, d = shape
    return x_BKRd.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4)


_attention_on_cpu.defvjp(_attention_on_cpu_forward, _attention_on_cpu_backward)


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
