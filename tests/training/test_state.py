"""The train step: one update of the whole batch, however it is cut; a state that starts from zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gqa import models
from gqa.data import loader
from gqa.objectives.language_model import Sums
from gqa.sharding import logical_axes, make_mesh
from gqa.training import optimizer as optimizers
from gqa.training import state as training_state
from gqa.training.loop import language_model_loss
from gqa.training.state import abstract_state, initial_state, jit_train_step, make_train_step, place_batch

Z_LOSS = 1e-2  # large enough to show in every gradient


@pytest.fixture(scope="module")
def setting(tiny_run):
    """A run of a Llama, its model, a mesh, and a batch whose rows have unequal weights (first row almost none)."""
    config = tiny_run("llama")
    model = models.create(config.model.architecture(), jax.random.key(1))
    batch = loader.train_batches(config.records, 8, 0)(0)
    rng = np.random.default_rng(0)
    row_weights = np.array([0.01, 1, 0.5, 0.25, 0, 2, 1, 1], np.float32)[:, None]
    weights = row_weights * rng.integers(0, 2, batch["targets"].shape).astype(np.float32)
    return config, model, make_mesh(config.mesh), batch | {"loss_weights": weights}


def weighted_loss(model, batch):
    """`sum(w * (nll + z_loss * log(Z)^2)) / sum(w)` over all tokens of the batch, and its parts."""
    logits = models.apply(model, batch)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    weights = batch["loss_weights"]
    loss, z_loss = ((weights * part).sum() / weights.sum() for part in (nll, Z_LOSS * log_z**2))
    hits = (weights * (logits.argmax(-1) == batch["targets"])).sum() / weights.sum()
    return loss + z_loss, (loss, z_loss, hits)


@pytest.fixture(scope="module")
def reference(setting):
    """Gradient and parts of `weighted_loss`."""
    _, model, _, batch = setting
    return jax.jit(jax.grad(weighted_loss, has_aux=True))(model, batch)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_update_is_that_of_the_whole_batch(setting, reference, accumulation):
    """With plain gradient descent at rate 1, the parameters move by the gradient itself."""
    _, model, mesh, batch = setting
    gradient, (loss, z_loss, hits) = reference
    optimizer = optax.sgd(1.0)
    like = abstract_state(jax.eval_shape(lambda: model), optimizer, mesh)
    train_step = make_train_step(
        language_model_loss(Z_LOSS, dropout=False),
        optimizer,
        lambda step: 0.5 + step,
        accumulation=accumulation,
        seed=0,
    )
    with jax.set_mesh(mesh):
        state = initial_state(model, optimizer, like)
        state, metrics = jit_train_step(train_step, like)(state, place_batch(mesh, batch))
    assert int(state.step) == 1
    for old, new, expected in zip(*map(jax.tree.leaves, (model, state.model, gradient)), strict=True):
        np.testing.assert_allclose(old - new, expected, rtol=0, atol=1e-6)
    assert jax.device_get(metrics) == pytest.approx(
        {
            "loss": float(loss),
            "z_loss": float(z_loss),
            "accuracy": float(hits),
            "target_tokens": float(batch["loss_weights"].sum()),
            "grad_norm": float(optax.tree.norm(gradient)),
            "learning_rate": 0.5,
            "added_loss": 0.0,
            "batch": 0,
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
        },
        rel=1e-5,
    )


def test_the_mean_of_micro_batches_would_be_another_update(setting, reference):
    """What the test above would miss if the micro-batches' weights were equal."""
    _, model, _, batch = setting
    gradient_fn = jax.jit(jax.grad(weighted_loss, has_aux=True))
    parts = [gradient_fn(model, jax.tree.map(lambda x, i=i: x[i::4], batch))[0] for i in range(4)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *parts)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, mean, reference[0]))
    assert difference > 0.1 * optax.tree.norm(reference[0])


def test_a_state_starts_from_zero(setting):
    """Uptraining moves the schedule to the original step, and nothing else."""
    config, model, mesh, _ = setting
    optimizer = optimizers.optimizer(config.optimizer, 1_000_000, logical_axes(model))
    like = abstract_state(jax.eval_shape(lambda: model), optimizer, mesh)
    state = initial_state(model, optimizer, like)
    assert int(state.step) == 0
    counts = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == ()]
    assert len(counts) == 2  # Adafactor's and the schedule's
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.optimizer))
    for kept, given in zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(kept, given)


def test_a_model_initialised_in_place_is_the_model(setting):
    config, model, mesh, _ = setting
    optimizer = optimizers.optimizer(config.optimizer, 0, logical_axes(model))
    like = abstract_state(jax.eval_shape(lambda: model), optimizer, mesh)
    state = initial_state(lambda: models.create(model.config, jax.random.key(1)), optimizer, like)
    for made, given in zip(jax.tree.leaves(state.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(made, given, rtol=1e-6, atol=1e-7)


def test_an_abstract_state_is_a_state_without_arrays(setting):
    config, model, mesh, _ = setting
    optimizer = optimizers.optimizer(config.optimizer, 0, logical_axes(model))
    like = abstract_state(jax.eval_shape(lambda: model), optimizer, mesh)
    state = initial_state(model, optimizer, like)
    assert jax.tree.structure(like) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)


def test_dropout_is_a_function_of_seed_and_step(setting):
    _, model, mesh, batch = setting
    model = models.create(models.replace(model.config, dropout_rate=0.3), jax.random.key(1))
    optimizer = optax.sgd(1.0)
    like = abstract_state(jax.eval_shape(lambda: model), optimizer, mesh)
    losses = {}
    with jax.set_mesh(mesh):
        start = initial_state(model, optimizer, like)
        for seed in (0, 1):
            train_step = make_train_step(
                language_model_loss(0.0, dropout=True), optimizer, lambda step: step, accumulation=1, seed=seed
            )
            loss_of = jax.jit(lambda state, batch, train_step=train_step: train_step(state, batch)[1]["loss"])
            for step in (0, 1, 0):
                state = start._replace(step=jnp.int32(step))
                loss = float(loss_of(state, place_batch(mesh, batch)))
                assert losses.setdefault((seed, step), loss) == loss
    assert len(set(losses.values())) == 4


@pytest.fixture(scope="module")
def step_of_factor(setting):
    """A state, and the step of a loss that is the batch's factor times the square of one array."""
    _, model, mesh, _ = setting
    optimizer = optax.sgd(optax.constant_schedule(1e-6), momentum=0.9)  # moments, and a counter
    like = abstract_state(jax.eval_shape(lambda: model), optimizer, mesh)

    def loss_fn(model, batch, key, step):
        loss = batch["factor"] * jnp.sum(jax.tree.leaves(model)[0] ** 2)
        zero = jnp.zeros(())
        return Sums(loss, zero, zero, weight_sum=jnp.ones(()), added_sum=zero, named={})

    train_step = make_train_step(loss_fn, optimizer, lambda step: step, accumulation=1, seed=0, skip_above=3.0)
    with jax.set_mesh(mesh):
        return initial_state(model, optimizer, like), jax.jit(train_step)


def without_counters(state):
    return [leaf for leaf in jax.tree.leaves((state.model, state.optimizer)) if leaf.dtype == jnp.float32]


def take(train_step, state, factors):
    """The state after a step for each factor, and which of them left the parameters alone."""
    left_out = []
    for factor in factors:
        new, metrics = train_step(state, {"factor": jnp.float32(factor)})
        same = [bool((a == b).all()) for a, b in zip(*map(without_counters, (state, new)), strict=True)]
        left_out.append(all(same))
        assert int(metrics["skipped_in_a_row"]) == [*left_out[::-1], False].index(False)
        state = new
    return state, left_out


def test_a_step_that_is_not_finite_changes_no_parameter(step_of_factor):
    state, train_step = step_of_factor
    after, left_out = take(train_step, state, [1, np.nan, np.inf, 1])
    assert left_out == [False, True, True, False]
    assert (int(after.step), int(after.batch), int(after.health.skipped)) == (4, 4, 2)
    assert [int(leaf) for leaf in jax.tree.leaves(after.optimizer) if leaf.shape == ()] == [4]
    assert np.isfinite(after.health.loss) and np.isfinite(after.health.grad_norm)


def test_steps_that_are_not_finite_are_no_part_of_the_means(step_of_factor):
    """Whatever comes first: as zeros they would make the good steps after them look high."""
    state, train_step = step_of_factor
    state, left_out = take(train_step, state, [np.nan] * 25 + [1] * 30)
    assert left_out == [True] * 25 + [False] * 30


def test_parameters_in_bfloat16_have_gradients_and_moments_in_float32():
    """Added up in bfloat16, 300 gradients of 1 would be 256; squares would stop growing as soon."""
    settings = dict(name="adamw", schedule="constant", learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8)
    optimizer = optimizers.optimizer(optimizers.OptimizerConfig(**settings), 0, {"['w']": ("embed",)})
    model = {"w": jnp.zeros(4, jnp.bfloat16)}

    def loss_fn(model, batch, key, step):
        zero = jnp.zeros(())
        loss = jnp.sum(model["w"].astype(jnp.float32) * batch["x"])
        return Sums(loss, zero, zero, weight_sum=jnp.float32(len(batch["x"])), added_sum=zero, named={})

    norms, states = [], []
    for accumulation in (1, 300):
        step = make_train_step(loss_fn, optimizer, lambda step: step, accumulation=accumulation, seed=0)
        start = training_state._initial(model, optimizer)
        state, metrics = jax.jit(step)(start, {"x": jnp.ones((300, 4))})
        norms.append(float(metrics["grad_norm"]))
        states.append(state)
        for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True):
            assert before.dtype == after.dtype
    assert norms[0] == norms[1] == pytest.approx(2.0)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(states[1].optimizer))


def test_a_step_far_above_the_mean_changes_no_parameter(step_of_factor):
    """After a warm-up; and a level that stays is the new one before long."""
    state, train_step = step_of_factor
    state, left_out = take(train_step, state, [1, 10] + [1] * 48)
    assert not any(left_out)
    state, left_out = take(train_step, state, [2, 10, 1])
    assert left_out == [False, True, False]
    _, left_out = take(train_step, state, [10] * 60)
    assert left_out[0] and not left_out[-1]
