"""Key/value heads of least error: a group's keys, and its values, in the directions that its queries and outputs use.

Which basis a head's keys are written in is arbitrary without RoPE: `(W_Q M⁻ᵀ, W_K M)` is the same head. A mean of heads
averages unrelated bases; here the group's stacked keys are projected on their d best directions, seen through its
queries, and the change of basis moves into W_Q, and for values into W_O. With RoPE the freedom is one complex number
for each head and frequency: rotation and scale. The result is an ordinary grouped-query attention.

Derivations: `docs/conversion.md`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

from gqa.convert.heads import Heads, Moments

DAMPING = 1e-8  # of the heads' mean energy of a direction, added to each: what queries never use stays invertible


class Basis(NamedTuple):
    """What makes a group's units one: `down` maps each unit's keys into the shared head, `up` back."""

    down: np.ndarray  # [K new, t, d, d]
    up: np.ndarray  # [K new, t, d, d]
    kept: np.ndarray  # [K new], energy kept
    total: np.ndarray  # [K new], energy there was


def key_basis(heads: Heads, moments: Moments, num_kv_heads: int, rotary: bool) -> Basis:
    """Of keys: the shared ones lose the least score energy `E[(q·(k - k̂))²]`, if q and k are independent.

    Without RoPE the top eigenvectors of `M Σ_K M` with M² the queries' second moments; with it, see `rotary_basis`.
    """
    queries = moments.of_queries(heads)
    if rotary:
        return rotary_basis(rotary_energy(queries), complex_moments(heads, moments), num_kv_heads)
    return _shared_basis(queries, moments.of_groups(heads.key, num_kv_heads, centred=True))


def value_basis(heads: Heads, moments: Moments, num_kv_heads: int) -> Basis:
    """Of values: the shared ones lose the least energy of outputs; top eigenvectors of `M Σ_V M`, M² = W_O W_Oᵀ."""
    return _shared_basis(out_energy(heads), moments.of_groups(heads.value, num_kv_heads, centred=False))


def share_keys(heads: Heads, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Kernels of the shared keys `[A, K new, d]` and of the queries that read them `[A, H, d]`."""
    num_kv_heads = len(basis.kept)
    units, queries = _grouped(heads.key, num_kv_heads), _split(heads.query_units(), num_kv_heads, 1)
    if np.iscomplexobj(basis.down):
        key = as_real(np.einsum("Agti,git->Agi", as_complex(units), basis.down))
        query = as_real(np.einsum("AgtGi,git->AgtGi", as_complex(queries), basis.up))
    else:
        key = np.einsum("Agtd,gtde->Age", units, basis.down, optimize=True)
        query = np.einsum("AgtGd,gtde->AgtGe", queries, basis.up, optimize=True)
    key, scale = _balanced(key, heads.key)
    return key, (query / scale[:, None, None, None]).reshape(heads.query.shape)


def share_values(heads: Heads, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Kernels of the shared values `[A, K new, d]` and of the output that reads them `[H, d, D]`."""
    num_kv_heads = len(basis.kept)
    value = np.einsum("Agtd,gtde->Age", _grouped(heads.value, num_kv_heads), basis.down, optimize=True)
    out = np.einsum("gtde,gtGdD->gtGeD", basis.up, _split(heads.out_units(), num_kv_heads, 0), optimize=True)
    value, scale = _balanced(value, heads.value)
    return value, (out / scale[:, None, None, None, None]).reshape(heads.out.shape)


def out_energy(heads: Heads) -> np.ndarray:
    """`W_O W_Oᵀ` summed over the query heads of a unit, `[K, d, d]`."""
    out = heads.out_units()
    K, G, d, D = out.shape
    rows = out.transpose(0, 2, 1, 3).reshape(K, d, G * D)
    return rows @ rows.transpose(0, 2, 1)


def rotary_basis(energy: np.ndarray, z: np.ndarray, num_kv_heads: int) -> Basis:
    """Of keys with RoPE: complex numbers `down` and `up` `[K new, d/2, t]` for each frequency and unit.

    Args:
      energy: `E|q|²` of each unit and frequency, `[K, d/2]` (`rotary_energy`).
      z: `complex_moments`.
      num_kv_heads: K new.
    """
    groups = _group_indices(len(energy), num_kv_heads)
    weights = energy.T[:, groups].transpose(1, 0, 2)  # [K new, d/2, t]
    root = np.sqrt(_damped(weights, weights.mean(axis=(1, 2), keepdims=True)))
    y = root[..., :, None] * z[:, groups[:, :, None], groups[:, None, :]].transpose(1, 0, 2, 3) * root[..., None, :]
    values, vectors = np.linalg.eigh(y)
    best = vectors[..., -1].conj()
    # An eigenvector's phase is arbitrary: the first unit keeps its own, so that equal heads stay as they are.
    best *= np.exp(-1j * np.angle(best[..., :1]))
    return Basis(best * root, best / root, values[..., -1].sum(-1), values.sum((-2, -1)))


def rotary_energy(queries: np.ndarray) -> np.ndarray:
    """`E|q|²` at each frequency, both components, `[K, d/2]`, of the queries' second moments by unit `[K, d, d]`."""
    K, d = queries.shape[:2]
    energy = np.diagonal(queries, axis1=1, axis2=2).reshape(K, 2, d // 2).sum(1)
    return np.maximum(energy, 0)  # rounding leaves directions that the inputs never take below zero


def complex_moments(heads: Heads, moments: Moments) -> np.ndarray:
    """`E[z_g conj(z_h)]` of units g, h for each frequency, `[d/2, K, K]`; `z = k[i] + j k[i + d/2]` (RoPE turns z)."""
    z = as_complex(heads.key).transpose(2, 1, 0)  # [d/2, K, A]
    found = z @ as_complex(moments.projected(heads.key)).transpose(2, 0, 1).conj()
    return (found + found.conj().swapaxes(-1, -2)) / 2


def as_complex(projection: np.ndarray) -> np.ndarray:
    """The pairs that RoPE turns, `[…, d/2]` complex, of the half-split layout `[…, d]`."""
    first, second = np.split(projection, 2, axis=-1)
    return first + 1j * second


def as_real(projection: np.ndarray) -> np.ndarray:
    """The inverse of `as_complex`."""
    return np.concatenate([projection.real, projection.imag], axis=-1)


def _shared_basis(weights: np.ndarray, moments: np.ndarray) -> Basis:
    """The d best directions of each group, of `weights` M² `[K, d, d]` and `moments` `[K new, t * d, t * d]`."""
    K, d = weights.shape[:2]
    t = K // len(moments)
    root, inverse = _roots(weights)
    down, up, kept, total = [], [], [], []
    for units, sigma in zip(_group_indices(K, len(moments)), moments, strict=True):
        seen = _seen(root[units], sigma)
        energy, best = scipy.linalg.eigh(seen, subset_by_index=(t * d - d, t * d - 1))
        best = best[:, ::-1].reshape(t, d, d)
        down.append(root[units] @ best)
        up.append(inverse[units] @ best)
        kept.append(energy.sum())
        total.append(np.trace(seen))
    return Basis(np.stack(down), np.stack(up), np.array(kept), np.array(total))


def seen_keys(heads: Heads, moments: Moments, rotary: bool) -> np.ndarray:
    """Moments of all units' keys as their queries see them: `[K * d, K * d]`, or with RoPE `[d/2, K, K]` complex."""
    queries = moments.of_queries(heads)
    if not rotary:
        return _seen(_roots(queries)[0], moments.of_keys(heads, centred=True))
    root = np.sqrt(rotary_energy(queries).T)
    return root[:, :, None] * complex_moments(heads, moments) * root[:, None, :]


def seen_values(heads: Heads, moments: Moments) -> np.ndarray:
    """Moments of all units' values as the outputs see them, `[K * d, K * d]`."""
    return _seen(_roots(out_energy(heads))[0], moments.of_values(heads))


def kept_energy(seen: np.ndarray, group: Sequence[int], d: int) -> float:
    """Share of all energy in `seen` that the units of `group` keep if they share one head of width d."""
    if seen.ndim == 3:
        part, rank = seen[:, group][:, :, group], 1
        units = seen.shape[1]
    else:
        units = len(seen) // d
        rows = (np.asarray(group)[:, None] * d + np.arange(d)).reshape(-1)
        part, rank = seen[np.ix_(rows, rows)], d
    total = np.trace(seen, axis1=-2, axis2=-1).real.sum()
    # Where nothing but rounding is there, it must not be more than all.
    return min(float(np.linalg.eigvalsh(part)[..., -rank:].sum() / total), 1.0) if total > 0 else len(group) / units


def _roots(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots and inverse roots of matrices `[K, d, d]`, damped."""
    values, vectors = np.linalg.eigh(weights)
    values = _damped(np.maximum(values, 0), np.maximum(values, 0).mean())
    return tuple((vectors * power[:, None, :]) @ vectors.swapaxes(-1, -2) for power in (values**0.5, values**-0.5))


def _seen(root: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """`M Σ M` of a block-diagonal M `[K, d, d]`."""
    K, d = root.shape[:2]
    half = np.matmul(root, sigma.reshape(K, d, K * d)).reshape(K * d, K * d)
    seen = np.matmul(root, half.T.reshape(K, d, K * d)).reshape(K * d, K * d)
    return (seen + seen.T) / 2


def _damped(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Never zero; where all heads are dead, one."""
    return np.where(mean > 0, values + DAMPING * np.maximum(mean, 0), 1.0)


def _balanced(shared: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shared kernels `[A, K new, d]` with the mean size of those before, and each head's factor.

    Which size a key has and which its queries is free; uptraining wants both as they were.
    """

    def size(kernels):
        return np.sqrt(np.square(kernels).sum(axis=(0, 2)))

    wanted = size(before).reshape(shared.shape[1], -1).mean(axis=1)
    found = size(shared)
    scale = np.where((found > 0) & (wanted > 0), wanted / np.where(found > 0, found, 1), 1.0)
    return shared * scale[:, None], scale


def _group_indices(K: int, num_groups: int) -> np.ndarray:
    return np.arange(K).reshape(num_groups, K // num_groups)


def _grouped(projection: np.ndarray, num_groups: int) -> np.ndarray:
    """`[A, K, d]` as `[A, K new, t, d]`."""
    return _split(projection, num_groups, 1)


def _split(array: np.ndarray, num_groups: int, axis: int) -> np.ndarray:
    """The axis of units as two: groups, units of a group."""
    shape = array.shape
    return array.reshape(*shape[:axis], num_groups, shape[axis] // num_groups, *shape[axis + 1 :])
