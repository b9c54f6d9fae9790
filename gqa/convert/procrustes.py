"""Means of heads that are turned towards each other first, and means with the size of what they are means of.

Procrustes (arXiv 2412.20677): each head's keys, and its values, are turned onto the mean of its group's, by an
orthogonal matrix, or with RoPE by one angle for each frequency; the turn moves into W_Q and W_O, so that only the mean
loses anything. `renorm` multiplies a mean by what restores the heads' average norm.
"""

import numpy as np

from gqa.convert.heads import Heads, Moments
from gqa.convert.svd import as_complex, as_real, complex_moments

ITERATIONS = 10  # towards the mean of the group; the first is the first head


def align(heads: Heads, moments: Moments, num_kv_heads: int, rotary: bool) -> Heads:
    """The same function, the units of each group turned towards each other."""
    K, d = heads.num_kv_heads, heads.key.shape[-1]
    t = K // num_kv_heads
    query, out = heads.query_units().copy(), heads.out_units().copy()
    key, value = heads.key.copy(), heads.value.copy()
    values = moments.of_values(heads).reshape(K, d, K, d)
    keys = complex_moments(heads, moments) if rotary else moments.of_keys(heads, centred=True).reshape(K, d, K, d)
    for first in range(0, K, t):
        group = slice(first, first + t)
        turns = _turns(values[group, :, group])
        value[:, group] = np.einsum("Atd,tde->Ate", value[:, group], turns)
        out[group] = np.einsum("tde,tGdD->tGeD", turns, out[group])
        if rotary:
            turns = _phases(keys[:, group, group])  # [t, d/2]
            key[:, group] = as_real(as_complex(key[:, group]) * turns)
            query[:, group] = as_real(as_complex(query[:, group]) * turns[:, None])
        else:
            turns = _turns(keys[group, :, group])
            key[:, group] = np.einsum("Atd,tde->Ate", key[:, group], turns)
            query[:, group] = np.einsum("AtGd,tde->AtGe", query[:, group], turns)
    return Heads(query.reshape(heads.query.shape), key, value, out.reshape(heads.out.shape))


def mean(heads: Heads, num_kv_heads: int) -> Heads:
    """The mean of each group's keys and values (GQA §2.1)."""

    def pool(projection):
        A, K, d = projection.shape
        return projection.reshape(A, num_kv_heads, K // num_kv_heads, d).mean(axis=2)

    return heads._replace(key=pool(heads.key), value=pool(heads.value))


def restore_norm(pooled: Heads, before: Heads, moments: Moments) -> Heads:
    """`pooled`, each key and value head scaled to the root mean square of the units of `before` that it stands for."""

    def factor(after: np.ndarray, units: np.ndarray) -> np.ndarray:
        d = pooled.key.shape[-1]
        found, wanted = (np.sqrt(np.diagonal(sigma).reshape(-1, d).sum(1)) for sigma in (after, units))
        wanted = wanted.reshape(len(found), -1).mean(1)
        return np.where(found > 0, wanted / np.where(found > 0, found, 1), 1.0)[:, None]

    keys = factor(moments.of_keys(pooled, centred=False), moments.of_keys(before, centred=False))
    values = factor(moments.of_values(pooled), moments.of_values(before))
    return pooled._replace(key=pooled.key * keys, value=pooled.value * values)


def _turns(sigma: np.ndarray) -> np.ndarray:
    """Orthogonal matrices `[t, d, d]` that turn a group onto its mean, of its second moments `[t, d, t, d]`."""
    t, d = sigma.shape[:2]
    turns = np.concatenate([np.eye(d)[None], np.zeros((t - 1, d, d))])  # the first reference is the first head
    for _ in range(ITERATIONS):
        towards = np.einsum("aibj,bjk->aik", sigma, turns)  # E[k_aᵀ mean]
        left, _, right = np.linalg.svd(towards)
        turns = left @ right
    return turns


def _phases(moments: np.ndarray) -> np.ndarray:
    """Unit complex numbers `[t, d/2]` that turn a group onto its mean, of `E[z_g conj(z_h)]` `[d/2, t, t]`."""
    turns = np.zeros(moments.shape[:2], complex)
    turns[:, 0] = 1
    for _ in range(ITERATIONS):
        towards = np.einsum("iab,ib->ia", moments, turns.conj())  # E[z_a conj(mean)]
        turns = np.exp(-1j * np.angle(towards))
    return turns.T
