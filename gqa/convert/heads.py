"""One attention's heads as float64 matrices of NumPy, on which the calibrated methods work.

Rows are the model width and, last, a constant 1: a bias is the last row of its projection, so that every method is
linear in `[x, 1]` and treats biases exactly. A *unit* is one present key/value head with the G query heads that read
it; what was multi-head has H units of one query head.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from gqa.nn.attention import GroupedQueryAttention


class Heads(NamedTuple):
    """Projections of `[x, 1]`, A = D + 1 rows, and the output's kernel; float64."""

    query: np.ndarray  # [A, H, d]
    key: np.ndarray  # [A, K, d]
    value: np.ndarray  # [A, K, d]
    out: np.ndarray  # [H, d, D]

    @property
    def num_kv_heads(self) -> int:
        """Units, K."""
        return self.key.shape[1]

    def query_units(self) -> np.ndarray:
        """Queries by unit, `[A, K, G, d]`."""
        A, H, d = self.query.shape
        return self.query.reshape(A, self.num_kv_heads, H // self.num_kv_heads, d)

    def out_units(self) -> np.ndarray:
        """The output's kernel by unit, `[K, G, d, D]`."""
        H, d, D = self.out.shape
        return self.out.reshape(self.num_kv_heads, H // self.num_kv_heads, d, D)

    def permuted(self, order: np.ndarray) -> "Heads":
        """The units `order` alone, in that order: of all of them, the same function."""
        A, _, d = self.query.shape
        return Heads(
            self.query_units()[:, order].reshape(A, -1, d),
            self.key[:, order],
            self.value[:, order],
            self.out_units()[order].reshape(-1, d, self.out.shape[-1]),
        )


def read_heads(attention: GroupedQueryAttention) -> Heads:
    """The heads of one layer's attention."""

    def affine(kernel, bias) -> np.ndarray:
        kernel = np.asarray(kernel[...], np.float64)
        last = np.zeros(kernel.shape[1:]) if bias is None else np.asarray(bias[...], np.float64)
        return np.concatenate([kernel, last[None]])

    biases = [getattr(attention, f"{name}_bias", None) for name in ("query", "key", "value")]
    kernels = [affine(*pair) for pair in zip((attention.query, attention.key, attention.value), biases, strict=True)]
    return Heads(*kernels, np.asarray(attention.out[...], np.float64))


def write_heads(attention: GroupedQueryAttention, heads: Heads) -> GroupedQueryAttention:
    """A copy of `attention` with these heads, in its dtypes; norms of queries and keys stay."""
    attention = with_out(attention, heads.out)
    for name in ("query", "key", "value"):
        kernel = getattr(attention, name)
        affine = getattr(heads, name)
        setattr(attention, name, kernel.replace(affine[:-1].astype(kernel.dtype)))
        if attention.qkv_bias:
            bias = getattr(attention, f"{name}_bias")
            setattr(attention, f"{name}_bias", bias.replace(affine[-1].astype(bias.dtype)))
        elif np.any(affine[-1]):
            raise AssertionError(f"the method gave a {name} bias to an attention without biases")
    return attention


def with_out(attention: GroupedQueryAttention, out: np.ndarray) -> GroupedQueryAttention:
    """A copy of `attention` with the output's kernel `out` `[H, d, D]`, in its dtype."""
    attention = jax.tree.map(lambda leaf: leaf, attention)
    attention.out = attention.out.replace(out.astype(attention.out.dtype))
    return attention


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of what one attention reads: the mean of `[x, 1]ᵀ[x, 1]` over calibration tokens.

    From these follow, for any weights, the moments of queries, keys and values; their size does not depend on the
    number of tokens. Self-attention has one matrix for both sides. In float32 or float64: the product with a kernel,
    at widths of thousands most of a method's work, is taken in their precision and the rest in float64.
    """

    query: np.ndarray  # [D + 1, D + 1], of the inputs of queries
    key_value: np.ndarray  # [D + 1, D + 1], of the inputs of keys and values
    tokens: int  # on the side that has fewer; 0: assumed, not measured

    def of_queries(self, heads: Heads) -> np.ndarray:
        """`E[qᵀq]` of each query head, summed over the query heads of a unit: `[K, d, d]`."""
        d = heads.query.shape[-1]
        projected = _product(self.query, heads.query)  # [A, H, d]
        per_head = np.matmul(heads.query.transpose(1, 2, 0), projected.transpose(1, 0, 2))
        return per_head.reshape(heads.num_kv_heads, -1, d, d).sum(1)

    def of_keys(self, heads: Heads, *, centred: bool) -> np.ndarray:
        """`E[kᵀk]` of all units' keys side by side, `[K * d, K * d]`; `centred`: their covariance."""
        return self.of_groups(heads.key, 1, centred=centred)[0]

    def of_values(self, heads: Heads) -> np.ndarray:
        """`E[vᵀv]` of all units' values side by side, `[K * d, K * d]`."""
        return self.of_groups(heads.value, 1, centred=False)[0]

    def of_groups(self, kernel: np.ndarray, num_groups: int, *, centred: bool) -> np.ndarray:
        """The same within each of equal groups of the units of `kernel` `[A, K, d]`: `[num_groups, t * d, t * d]`."""
        flat, projected = (
            array.reshape(len(kernel), num_groups, -1).transpose(1, 0, 2) for array in (kernel, self.projected(kernel))
        )
        moments = np.matmul(flat.swapaxes(1, 2), projected)
        if centred:
            mean = projected[:, -1]  # the last of [x, 1] is 1
            moments -= mean[:, :, None] * mean[:, None]
        return (moments + moments.swapaxes(1, 2)) / 2

    def projected(self, kernel: np.ndarray) -> np.ndarray:
        """`E[[x, 1]ᵀ[x, 1] W]` of a kernel W of keys or values, `[A, K, d]`."""
        return _product(self.key_value, kernel)


def _product(moments: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`[A, A]` times `[A, heads, d]`, in the precision of the moments, as float64."""
    return np.tensordot(moments, kernel.astype(moments.dtype), axes=1).astype(np.float64)
