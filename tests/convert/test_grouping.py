import itertools

import numpy as np
import pytest

from gqa.convert import grouping

WITHIN = {2: [(0, 5), (1, 4), (2, 7), (3, 6)], 4: [(0, 5, 6, 3), (1, 4, 2, 7)]}


def groups(order, size):
    return {frozenset(map(int, order[first : first + size])) for first in range(0, len(order), size)}


def random_energy(seed):
    """A number for each group, whatever its units' order."""
    values = {}
    return lambda group: values.setdefault(frozenset(group), np.random.default_rng([seed, *sorted(group)]).uniform())


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_scattered_copies_are_found(rotary, size, attention_case, rebased, copied):
    rng = np.random.default_rng(0)
    heads, _, _, moments = attention_case(rng, 8, 1, 4)
    heads = rebased(rng, copied(heads, size), rotary)
    planted = {frozenset(group) for group in WITHIN[size]}
    order = [unit for group in WITHIN[size] for unit in group]
    # Position `order[i]` gets unit i: neighbours go where the planted groups say.
    heads = heads.permuted(np.argsort(order))
    energy = grouping.group_energy(heads, moments, rotary)
    assert groups(grouping.best_order([energy], [size], 8), size) == planted
    np.testing.assert_allclose(sum(energy(tuple(sorted(group))) for group in planted), 2, rtol=1e-6)
    np.testing.assert_allclose(sum(energy((unit,)) for unit in range(8)), 2, rtol=1e-6)


def test_swaps_find_sixteen_scattered_heads(attention_case, rebased, copied):
    rng = np.random.default_rng(0)
    heads, _, _, moments = attention_case(rng, 16, 1, 4)
    heads = rebased(rng, copied(heads, 4), rotary=True)
    order = rng.permutation(16)
    planted = groups(order, 4)
    energy = grouping.group_energy(heads.permuted(np.argsort(order)), moments, rotary=True)
    assert groups(grouping.best_order([energy], [4], 16), 4) == planted
    # Of a layer that needs groups of 8, pairs are scored; its energies may be numbers computed before.
    pairs = grouping.pair_energies(energy, 16)
    assert grouping.scored_by_pairs(16, [4, 8]) and not grouping.scored_by_pairs(16, [4])
    found = grouping.best_order([pairs, pairs], [4, 8], 16)
    assert groups(found, 4) == planted


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_few_units_are_searched_exhaustively(size, seed):
    energies = [random_energy(seed), random_energy(seed + 10)]

    def value(order):
        return sum(energy(group) for energy in energies for group in groups(order, size))

    best = max(map(value, itertools.permutations(range(6))))
    np.testing.assert_allclose(value(grouping.best_order(energies, [size, size], 6)), best)


def test_one_order_serves_layers_of_different_sizes():
    planted = {frozenset((0, 3)), frozenset((1, 2)), frozenset((0, 1, 2, 3)), frozenset((4, 6)), frozenset((5, 7))}

    def energy(group):
        return float(frozenset(group) in planted) * len(group) + 0.1 * sum(
            len(planted_group & set(group)) ** 2 for planted_group in planted
        )

    order = grouping.best_order([energy, energy, energy], [2, 4, 1], 8)
    assert groups(order, 2) | groups(order, 4) >= planted


def test_partitions():
    assert list(grouping.partitions(4, 2)) == [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]
    for num_units, size, number in ((8, 2, 105), (8, 4, 35), (6, 3, 10), (5, 1, 1), (5, 5, 1)):
        found = [frozenset(groups(order, size)) for order in grouping.partitions(num_units, size)]
        assert len(found) == len(set(found)) == grouping.num_partitions(num_units, size) == number


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_that_does_nothing_loses_nothing_however_its_heads_share(rotary, attention_case):
    heads, _, _, moments = attention_case(np.random.default_rng(0), 4, 1, 4)
    energy = grouping.group_energy(type(heads)(*map(np.zeros_like, heads)), moments, rotary)
    for size in (1, 2, 4):
        assert sum(energy(tuple(range(first, first + size))) for first in range(0, 4, size)) == 2
