"""Which heads share: the partition into groups that keeps the most energy of keys and values together.

Reordering units (key/value heads with their queries and output rows) changes nothing, so groups need not be
neighbours. Where the layers of a stack share T5's bias table, whose columns are query heads, one order serves them all.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from gqa.convert.heads import Heads, Moments
from gqa.convert.svd import kept_energy, seen_keys, seen_values

MAX_PARTITIONS = 20_000  # up to which all are tried: of 12 heads into groups of any size, of 16 not
MAX_GROUPS = 2000  # of one size, up to which groups are scored whole; above, by their pairs
RESTARTS = 8  # of the search by swaps, the first from neighbours

Energy = Callable[[tuple[int, ...]], float]  # of a sorted group of units: share kept of keys plus share kept of values


def group_energy(heads: Heads, moments: Moments, rotary: bool) -> Energy:
    """The energy that a group of units keeps if it shares one head, as shares of all units' keys and values."""
    d = heads.key.shape[-1]
    sides = [seen_values(heads, moments), seen_keys(heads, moments, rotary)]

    @functools.cache
    def energy(group: tuple[int, ...]) -> float:
        return sum(kept_energy(side, group, d) for side in sides)

    return energy


def scored_by_pairs(num_units: int, sizes: Sequence[int]) -> bool:
    """Whether there are too many groups to score them whole: then a group is worth the mean of its pairs."""
    return max(math.comb(num_units, size) for size in sizes) > MAX_GROUPS


def pair_energies(energy: Energy, num_units: int) -> Energy:
    """`energy` of single units and of pairs, computed now: what it is computed from can go."""
    groups = [group for size in (1, 2) for group in itertools.combinations(range(num_units), size)]
    return {group: energy(group) for group in groups}.__getitem__


def best_order(energies: Sequence[Energy], sizes: Sequence[int], num_units: int) -> np.ndarray:
    """The order of units in which neighbours form the groups that keep the most.

    Args:
      energies: of each layer that shares the order.
      sizes: units of a group in each of these layers.
      num_units: present key/value heads.

    All partitions are tried where there are at most `MAX_PARTITIONS`; else units are swapped while that helps, from
    `RESTARTS` starts.
    """
    pairwise = scored_by_pairs(num_units, sizes)

    def value(order: Sequence[int]) -> float:
        total = 0.0
        for energy, size in zip(energies, sizes, strict=True):
            for first in range(0, num_units, size):
                group = tuple(sorted(order[first : first + size]))
                if pairwise and size > 2:
                    total += sum(energy(pair) for pair in itertools.combinations(group, 2)) / (size - 1)
                else:
                    total += energy(group)
        return total

    if len(set(sizes)) == 1 and num_partitions(num_units, sizes[0]) <= MAX_PARTITIONS:
        return np.array(max(partitions(num_units, sizes[0]), key=value))
    rng = np.random.default_rng(0)
    starts = [np.arange(num_units)] + [rng.permutation(num_units) for _ in range(RESTARTS - 1)]
    return np.array(max((_swapped([int(unit) for unit in start], value) for start in starts), key=value))


def _swapped(order: list[int], value: Callable[[Sequence[int]], float]) -> list[int]:
    """`order` after swaps of two units that each raised its value, until none does."""
    best, improved = value(order), True
    while improved:
        improved = False
        for i, j in itertools.combinations(range(len(order)), 2):
            order[i], order[j] = order[j], order[i]
            found = value(order)
            if found > best + 1e-12:
                best, improved = found, True
            else:
                order[i], order[j] = order[j], order[i]
    return order


def num_partitions(num_units: int, size: int) -> int:
    """Ways to split units into unordered groups of `size`."""
    groups = num_units // size
    return math.factorial(num_units) // (math.factorial(size) ** groups * math.factorial(groups))


def partitions(num_units: int, size: int):
    """Every partition into groups of `size`, as an order in which neighbours form the groups; neighbours first."""

    def split(left: tuple[int, ...]):
        if not left:
            yield ()
            return
        for others in itertools.combinations(left[1:], size - 1):
            rest = tuple(unit for unit in left[1:] if unit not in others)
            for tail in split(rest):
                yield (left[0], *others, *tail)

    return split(tuple(range(num_units)))
