import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.decode.sampling import next_tokens, processed_logits, sampling
from gqa.errors import InputError

V = 1000
LOGITS = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def expected_probabilities(temperature, top_k=None, top_p=None):
    """The distribution, from its definition."""
    probabilities = softmax(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-probabilities)
    if top_k is not None:
        probabilities[order[top_k:]] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        kept = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1
        probabilities[order[kept:]] = 0
    return probabilities / probabilities.sum()


def draw(settings, key, batches: int, rows: int):
    def batch(number):
        logits = jnp.broadcast_to(jnp.asarray(LOGITS), (rows, V))
        return next_tokens(logits, settings, key, number * rows + jnp.arange(rows), jnp.full(rows, 3))

    return jax.lax.map(batch, jnp.arange(batches)).reshape(-1)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dict(temperature=1.3), marks=pytest.mark.full),
        dict(temperature=1.2, top_k=50),
        dict(temperature=0.8, top_p=0.9),
    ],
    ids=lambda settings: "_".join(settings),
)
def test_frequencies_are_the_distribution(settings, check_frequencies, optimised):
    compiled = jax.jit(draw, static_argnames=("batches", "rows"), compiler_options=optimised)
    tokens = np.asarray(compiled(sampling(**settings), jax.random.key(1), batches=25, rows=4096))
    assert len(tokens) >= 100_000
    check_frequencies(np.bincount(tokens, minlength=V), expected_probabilities(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=2.0, top_k=3),
        dict(temperature=0.7, top_p=0.5),
        dict(temperature=1.0, top_k=20, top_p=0.8),
        dict(temperature=1.0, top_k=V + 5, top_p=1.0),
    ],
)
def test_distribution_is_as_defined(settings):
    found = jax.nn.softmax(processed_logits(jnp.asarray(LOGITS[None]), sampling(**settings)))[0]
    np.testing.assert_allclose(found, expected_probabilities(**settings), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "left"), [(dict(top_k=5), 5), (dict(top_p=0.1), 10), (dict(top_k=50, top_p=0.5), 25)]
)
def test_of_equal_tokens_no_more_are_left(settings, left):
    found = processed_logits(jnp.zeros((2, 100)), sampling(temperature=1.0, **settings))
    # The sum of 1/100 up to a share is exact to rounding only.
    assert all(abs(int(number) - left) <= 1 for number in jnp.isfinite(found).sum(-1))


def test_one_token_left_is_the_most_likely():
    logits = np.random.default_rng(1).normal(0, 2, (4, 30)).astype(np.float32)
    rows = jnp.arange(4)
    best = next_tokens(logits, None, jax.random.key(0), rows, rows)
    assert best.tolist() == logits.argmax(axis=1).tolist()
    for settings in (sampling(1.0, top_k=1), sampling(5.0, top_p=1e-6)):
        assert next_tokens(logits, settings, jax.random.key(0), rows, rows).tolist() == best.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=0.0), "temperature=0.0 is not above 0; leave it out"),
        (dict(temperature=-1.0), "temperature=-1.0 is not above 0"),
        (dict(temperature=float("nan")), "temperature=nan is not above 0"),
        (dict(temperature=1e-38), "temperature=1e-38 is below 1e-30, float32 cannot hold"),
        (dict(temperature=1.0, top_k=0), "top_k=0 is below 1; expected 1 or more"),
        (dict(temperature=1.0, top_p=0.0), "top_p=0.0 is not above 0 and at most 1; nearest: 0.01"),
        (dict(temperature=1.0, top_p=1.5), "top_p=1.5 is not above 0 and at most 1; nearest: 1.0"),
    ],
)
def test_settings_without_a_distribution(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        sampling(**settings)


def test_all_tokens_are_left_where_top_p_is_1():
    logits = -jnp.arange(1000.0)[None] / 20  # the last are below a rounding of 1
    assert jnp.isfinite(processed_logits(logits, sampling(1.0, top_p=1.0))).all()


@pytest.mark.parametrize("settings", [dict(top_k=50), dict(top_k=50, top_p=0.9)], ids=lambda s: "_".join(s))
def test_top_k_does_not_sort_the_vocabulary(settings):
    logits = jax.ShapeDtypeStruct((4, V), jnp.float32)
    program = jax.jit(processed_logits).lower(logits, sampling(1.0, **settings)).compile().as_text()
    assert "TopK" in program and " sort(" not in program
