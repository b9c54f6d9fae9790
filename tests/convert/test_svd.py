import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.convert import procrustes, svd
from gqa.convert.heads import Heads, Moments

SHAPES = st.sampled_from([(2, 2, 1, 2), (4, 2, 1, 4), (4, 4, 1, 2), (6, 3, 1, 2), (4, 2, 2, 4), (8, 4, 2, 2)])
SEEDS = st.integers(0, 2**32 - 1)


def shared(heads, moments, num_kv_heads, rotary):
    """What SVD makes of heads, with the bases of keys and values."""
    keys = svd.key_basis(heads, moments, num_kv_heads, rotary)
    values = svd.value_basis(heads, moments, num_kv_heads)
    key, query = svd.share_keys(heads, keys)
    value, out = svd.share_values(heads, values)
    return Heads(query, key, value, out), keys, values


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, rotary=st.booleans(), biases=st.booleans(), seed=SEEDS)
def test_copies_in_other_bases_are_shared_without_loss(
    shape, rotary, biases, seed, attention_case, rebased, copied, outputs
):
    K, size, G, d = shape
    rng = np.random.default_rng(seed)
    heads, x_query, x_key_value, moments = attention_case(rng, K, G, d, biases=biases and rotary)
    heads = rebased(rng, copied(heads, size), rotary)
    expected = outputs(heads, x_query, x_key_value, rotary)
    new, keys, values = shared(heads, moments, K // size, rotary)
    assert new.key.shape == (3 * d + 1, K // size, d)
    np.testing.assert_allclose(keys.kept, keys.total, rtol=1e-6)
    np.testing.assert_allclose(values.kept, values.total, rtol=1e-6)
    assert np.abs(outputs(new, x_query, x_key_value, rotary) - expected).max() < 1e-6 * np.abs(expected).max()
    mean = procrustes.mean(heads, K // size)
    assert np.abs(outputs(mean, x_query, x_key_value, rotary) - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("rotary", [False, True])
def test_a_head_that_shares_with_none_is_the_same_function_in_another_basis(rotary, attention_case, outputs):
    heads, x_query, x_key_value, moments = attention_case(np.random.default_rng(0), 3, 2, 4, biases=rotary)
    new, keys, values = shared(heads, moments, 3, rotary)
    np.testing.assert_allclose([keys.kept, values.kept], [keys.total, values.total])
    inputs = (x_query, x_key_value, rotary)
    np.testing.assert_allclose(outputs(new, *inputs), outputs(heads, *inputs), atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, rotary=st.booleans(), seed=SEEDS)
def test_the_basis_that_heads_are_written_in_does_not_matter(shape, rotary, seed, attention_case, rebased, outputs):
    K, size, G, d = shape
    rng = np.random.default_rng(seed)
    heads, x_query, x_key_value, moments = attention_case(rng, K, G, d)
    others = rebased(rng, heads, rotary)
    inputs = (x_query, x_key_value, rotary)
    np.testing.assert_allclose(outputs(others, *inputs), outputs(heads, *inputs), atol=1e-9)
    found, expected = (shared(each, moments, K // size, rotary) for each in (others, heads))
    for side in (1, 2):
        np.testing.assert_allclose(found[side].kept, expected[side].kept, rtol=1e-5)
    # Where the last direction kept and the first lost are as strong, either is right.
    np.testing.assert_allclose(outputs(found[0], *inputs), outputs(expected[0], *inputs), atol=1e-3)
    within = np.concatenate([first + rng.permutation(size) for first in range(0, K, size)])
    permuted = shared(heads.permuted(within), moments, K // size, rotary)[0]
    np.testing.assert_allclose(outputs(permuted, *inputs), outputs(expected[0], *inputs), atol=1e-3)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("shape", [(4, 2, 1, 4), (4, 4, 2, 2)])
def test_what_is_lost_is_the_score_error_and_no_other_shared_head_loses_less(
    shape, rotary, attention_case, score_error
):
    K, size, G, d = shape
    rng = np.random.default_rng(0)
    heads, _, _, moments = attention_case(rng, K, G, d)
    new, keys, _ = shared(heads, moments, K // size, rotary)
    least = score_error(heads, new, moments, rotary)
    np.testing.assert_allclose(least, (keys.total - keys.kept).sum(), rtol=1e-5)
    no_keys = heads._replace(key=np.zeros_like(heads.key))
    np.testing.assert_allclose(keys.total.sum(), score_error(heads, no_keys, moments, rotary), rtol=1e-5)
    aligned = procrustes.mean(procrustes.align(heads, moments, K // size, rotary), K // size)
    others = {"procrustes": aligned, "mean": procrustes.mean(heads, K // size)}
    errors = {name: score_error(heads, other, moments, rotary) for name, other in others.items()}
    assert least < errors["procrustes"] < errors["mean"]
    for step in (1e-1, 1e-2, 1e-3) * 20:
        near = new._replace(
            key=new.key + step * rng.normal(size=new.key.shape),
            query=new.query + step * rng.normal(size=new.query.shape),
        )
        assert score_error(heads, near, moments, rotary) > least


def test_values_keep_the_most_energy_of_outputs(attention_case):
    rng = np.random.default_rng(0)
    K, d = 4, 4
    heads, _, _, moments = attention_case(rng, K, 2, d)
    basis = svd.value_basis(heads, moments, 2)
    sigma = moments.of_values(heads)
    for group in range(2):
        units, rows = slice(2 * group, 2 * group + 2), slice(2 * group * d, 2 * group * d + 2 * d)
        out = heads.out_units()[units].transpose(0, 2, 1, 3).reshape(2, d, -1)
        root = scipy.linalg.block_diag(*(scipy.linalg.sqrtm(unit @ unit.T).real for unit in out))
        energies = np.linalg.eigvalsh(root @ sigma[rows, rows] @ root)
        np.testing.assert_allclose(basis.kept[group], energies[-d:].sum(), rtol=1e-6)
        np.testing.assert_allclose(basis.total[group], energies.sum(), rtol=1e-6)


def test_one_frequency_keeps_the_best_of_all_pairs_of_turns(attention_case):
    heads, _, _, moments = attention_case(np.random.default_rng(1), 2, 1, 2)
    energy, z = svd.rotary_energy(moments.of_queries(heads)), svd.complex_moments(heads, moments)
    basis = svd.rotary_basis(energy, z, 1)
    root = np.sqrt(energy[:, 0])
    y = root[:, None] * z[0] * root
    angle, phase = np.meshgrid(np.linspace(0, np.pi / 2, 400), np.linspace(-np.pi, np.pi, 800))
    u = np.stack([np.cos(angle), np.sin(angle) * np.exp(1j * phase)])
    best = np.einsum("aij,ab,bij->ij", u.conj(), y, u).real.max()
    np.testing.assert_allclose(basis.kept, best, rtol=1e-3)


@pytest.mark.parametrize("rotary", [False, True])
def test_dead_heads_cost_nothing(rotary, attention_case, outputs):
    heads, x_query, x_key_value, moments = attention_case(np.random.default_rng(0), 4, 1, 4)
    for unit in (1, 2):
        heads.query[:, unit] = 0
        heads.out[unit] = 0
    new, keys, values = shared(heads, moments, 2, rotary)
    np.testing.assert_allclose([keys.kept, values.kept], [keys.total, values.total], rtol=1e-6)
    expected = outputs(heads, x_query, x_key_value, rotary)
    np.testing.assert_allclose(outputs(new, x_query, x_key_value, rotary), expected, atol=1e-6)
    nothing = Heads(*map(np.zeros_like, heads))
    for array in shared(nothing, moments, 2, rotary)[0]:
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize("rotary", [False, True])
def test_moments_of_fewer_tokens_than_dimensions(rotary, attention_case, outputs):
    heads, x_query, x_key_value, moments = attention_case(np.random.default_rng(0), 4, 1, 4)
    few = [np.append(x[:3], np.ones((3, 1)), axis=1) for x in (x_query, x_key_value)]
    moments = Moments(*(x.T @ x / 3 for x in few), tokens=3)
    new, keys, values = shared(heads, moments, 2, rotary)
    assert all(np.isfinite(array).all() for array in new)
    # 3 tokens have keys and values of 3 directions: 4 hold them.
    np.testing.assert_allclose(values.kept, values.total, rtol=1e-6)
    if not rotary:
        np.testing.assert_allclose(keys.kept, keys.total, rtol=1e-6)
        inputs = (x_query[:3], x_key_value[:3], rotary)
        np.testing.assert_allclose(outputs(new, *inputs), outputs(heads, *inputs), atol=1e-5)


def test_shared_kernels_have_the_size_of_those_before(attention_case):
    heads, _, _, moments = attention_case(np.random.default_rng(0), 4, 1, 4)
    new, _, _ = shared(heads, moments, 2, rotary=False)
    for before, after in ((heads.key, new.key), (heads.value, new.value)):
        sizes = np.linalg.norm(before, axis=(0, 2)).reshape(2, 2).mean(1)
        np.testing.assert_allclose(np.linalg.norm(after, axis=(0, 2)), sizes)
