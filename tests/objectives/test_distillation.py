import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from gqa.objectives.distillation import attention_error, attention_sizes, kl_to_teacher, top_k

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 3, 4, 7)) * 2
WEIGHTS = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])


def kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def merged(p, ids):
    """Probabilities of the tokens `ids` and of all others together."""
    picked = np.take_along_axis(p, ids, axis=-1)
    return np.concatenate([picked, 1 - picked.sum(-1, keepdims=True)], axis=-1)


def test_the_whole_divergence():
    p, q = (scipy.special.softmax(logits, axis=-1) for logits in (TEACHER, STUDENT))
    found = kl_to_teacher(jnp.asarray(STUDENT), top_k(jnp.asarray(TEACHER), 7), WEIGHTS)
    assert float(found) == pytest.approx((kl(p, q) * WEIGHTS).sum(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_all_tokens_outside_of_the_first_k_count_as_one(k):
    p, q = (scipy.special.softmax(logits, axis=-1) for logits in (TEACHER, STUDENT))
    ids = np.argsort(-p, axis=-1)[..., :k]
    found = kl_to_teacher(jnp.asarray(STUDENT), top_k(jnp.asarray(TEACHER), k), WEIGHTS)
    assert float(found) == pytest.approx((kl(merged(p, ids), merged(q, ids)) * WEIGHTS).sum(), rel=1e-4)


def test_no_divergence_and_no_gradient_at_the_teacher():
    said = top_k(jnp.asarray(TEACHER), 3)
    value, gradient = jax.value_and_grad(kl_to_teacher)(jnp.asarray(TEACHER), said, WEIGHTS)
    assert abs(float(value)) < 1e-5
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_a_student_surer_than_its_teacher_is_told_so(k):
    """What it leaves the other tokens is under float32's resolution beside 1: their sum, not the rest of it."""
    teacher = np.zeros((1, 1, 50))
    teacher[..., :k] = 5
    student = np.where(teacher > 0, 25.0, 0.0)
    p, q = (merged(scipy.special.softmax(logits, axis=-1), np.arange(k)[None, None]) for logits in (teacher, student))
    q[..., -1] = (50 - k) * np.exp(-25.0) / (k + (50 - k) * np.exp(-25.0))
    known, weights = top_k(jnp.asarray(teacher), k), np.ones((1, 1))
    found, gradient = jax.value_and_grad(kl_to_teacher)(jnp.asarray(student, jnp.float32), known, weights)
    assert float(found) == pytest.approx(kl(p, q).sum(), rel=1e-4)
    assert float(jnp.abs(gradient).sum()) == pytest.approx(2 * p[..., -1].sum(), rel=1e-4)


def test_a_teacher_that_is_certain_gives_finite_gradients():
    certain = jnp.full((1, 1, 5), -100.0).at[..., 2].set(100.0)
    gradient = jax.grad(kl_to_teacher)(jnp.zeros((1, 1, 5)), top_k(certain, 2), np.ones((1, 1)))
    assert np.isfinite(gradient).all()


def test_attention_outputs_are_compared_where_tokens_count():
    """Two layers of 2 x 2 positions and width 1; the position of weight 0 does not count."""
    teacher = {"decoder_self": np.array([[[[1.0], [1.0]], [[2.0], [2.0]]], [[[1.0], [9.0]], [[2.0], [9.0]]]])}
    student = [np.array([[[1.0], [3.0]], [[1.0], [0.0]]]), np.array([[[2.0], [2.0]], [[2.0], [0.0]]])]
    weights = np.array([[1.0, 1.0], [1.0, 0.0]])
    sizes = {site: attention_sizes(outputs, weights) for site, outputs in teacher.items()}
    # Layer 0: squared errors 0, 4, 0 over a mean square of 1; layer 1 none.
    assert float(attention_error({"decoder_self": student}, teacher, sizes, weights)) == pytest.approx(2.0)


def test_attention_errors_of_micro_batches_add_up_to_the_whole_batchs():
    student, teacher = RNG.normal(size=(2, 4, 2, 3, 5)) * np.array([1, 2, 3, 4]).reshape(4, 1, 1, 1)
    weights = RNG.integers(0, 2, size=(4, 3))
    sizes = attention_sizes(teacher, weights)

    def error(rows):
        layers = {"decoder_self": [student[rows, layer] for layer in range(2)]}
        return float(
            attention_error(layers, {"decoder_self": teacher[rows]}, {"decoder_self": sizes[rows]}, weights[rows])
        )

    assert error(slice(0, 4, 2)) + error(slice(1, 4, 2)) == pytest.approx(error(slice(None)))
