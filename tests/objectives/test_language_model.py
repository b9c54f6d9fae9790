import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gqa.objectives.language_model import cross_entropy

Z_LOSS = 1e-4


def batch():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 7)) * 3, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 7, size=(2, 5)), jnp.int32)
    weights = jnp.asarray([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0.5]], jnp.float32)
    return logits, targets, weights


def total(logits, targets, weights):
    sums = cross_entropy(logits, targets, weights, Z_LOSS)
    return sums.loss_sum + sums.z_loss_sum


def test_literal_values():
    # Z = 1 + 1 + 2 = 4: probabilities 1/4, 1/4, 1/2. Each token: its target, its weight.
    logits = jnp.log(jnp.asarray([[[1.0, 1, 2], [1, 1, 2], [1, 1, 2], [1, 1, 2]]]))
    targets, weights = jnp.asarray([[2, 0, 1, 2]]), jnp.asarray([[1.0, 1.0, 0.0, 0.5]])
    sums = cross_entropy(logits, targets, weights, 0.01)
    np.testing.assert_allclose(sums.loss_sum, np.log(2) + np.log(4) + 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(sums.z_loss_sum, 0.01 * np.log(4) ** 2 * 2.5, rtol=1e-6)
    assert (sums.correct_sum, sums.weight_sum) == (1.5, 2.5)


def test_equals_optax():
    logits, targets, weights = batch()
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(
        cross_entropy(logits, targets, weights, Z_LOSS).loss_sum, jnp.sum(expected * weights), rtol=1e-6
    )


def test_gradient_is_the_formula():
    logits, targets, weights = batch()
    exact = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(exact).sum(-1, keepdims=True))
    softmax, one_hot = np.exp(exact - log_z), np.eye(7)[np.asarray(targets)]
    # d/dlogits of -log p(target) + z * log(Z)^2
    expected = (softmax - one_hot + 2 * Z_LOSS * log_z * softmax) * np.asarray(weights)[..., None]
    np.testing.assert_allclose(jax.grad(total)(logits, targets, weights), expected, rtol=1e-5, atol=1e-7)


def test_masked_tokens_change_nothing():
    logits, targets, weights = batch()
    masked = weights == 0
    gradient = np.asarray(jax.grad(total)(logits, targets, weights))
    assert np.all(gradient[masked] == 0.0)
    assert np.all(np.abs(gradient[~masked]).sum(-1) > 0.0)
    changed = cross_entropy(jnp.where(masked[..., None], 50.0, logits), jnp.where(masked, 3, targets), weights, Z_LOSS)
    assert changed == cross_entropy(logits, targets, weights, Z_LOSS)


def test_sums_of_micro_batches_add_up():
    logits, targets, weights = batch()
    whole = cross_entropy(logits, targets, weights, Z_LOSS)
    rows = [cross_entropy(logits[row], targets[row], weights[row], Z_LOSS) for row in range(2)]
    added = jax.tree.map(jnp.add, *rows)
    np.testing.assert_allclose(jax.tree.leaves(added), jax.tree.leaves(whole), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_reduced_in_float32(dtype):
    # 60_000 equal logits: log(Z) in bfloat16 is 11.0, in float32 11.0021. exp(12) overflows float16.
    logits = jnp.full((1, 1, 60_000), 12.0, dtype)
    sums = cross_entropy(logits, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), 1.0)
    np.testing.assert_allclose(sums.loss_sum, np.log(60_000), rtol=1e-6)
    np.testing.assert_allclose(sums.z_loss_sum, (12 + np.log(60_000)) ** 2, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    assert jax.grad(total)(logits, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))).dtype == dtype
