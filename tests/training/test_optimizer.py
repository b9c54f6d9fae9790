import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gqa.errors import InputError
from gqa.training.optimizer import OptimizerConfig, optimizer, schedule, state_axes

T5 = OptimizerConfig(
    name="adafactor",
    schedule="rsqrt",
    learning_rate=1.0,
    warmup_steps=10_000,
    decay_rate=0.8,
    clipping_threshold=1.0,
    multiply_by_parameter_scale=True,
)
LLAMA2 = OptimizerConfig(
    name="adamw",
    schedule="cosine",
    learning_rate=3e-4,
    warmup_steps=2000,
    decay_steps=500_000,
    final_ratio=0.1,
    clip_norm=1.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-5,
    weight_decay=0.1,
)
L, D, H, d, F = 3, 128, 4, 40, 160

AXES = {
    "['query']": ("embed", "heads", "head_dim"),
    "['out']": ("heads", "head_dim", "embed"),
    "['key']": ("embed", "kv_heads", "head_dim"),
    "['mlp']": ("embed", "mlp"),
    "['norm']": ("embed",),
    "['position_bias']": ("buckets", "heads"),
    "['final_norm']": ("embed",),
    "['embedding']": ("vocab", "embed"),
}
STACKED = ("query", "out", "key", "mlp", "norm")


def parameters():
    """One of each kind of leaf; each layer has its own scale, so that statistics over layers would show."""
    rng = np.random.default_rng(0)
    layer_scale = np.array([1e-5, 0.1, 3.0])
    shapes = {
        "query": (L, D, H, d),
        "out": (L, H, d, D),
        "key": (L, D, 1, d),  # 128 x 40: too narrow to factor
        "mlp": (L, D, F),
        "norm": (L, D),
        "position_bias": (32, H),
        "final_norm": (D,),
        "embedding": (256, D),
    }
    tree = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape)
        if name in STACKED:
            values *= layer_scale.reshape(-1, *[1] * (len(shape) - 1))
        tree[name] = jnp.asarray(values, jnp.float32)
    return tree


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-4, 3), jnp.float32), parameters()
    )


def layers_as_matrices(tree):
    """Every layer's kernel by itself, heads and head_dim merged: what Adafactor is defined on."""
    matrices = {}
    for name, leaf in tree.items():
        for layer, array in enumerate(leaf if name in STACKED else [leaf]):
            if name in ("query", "key"):
                array = array.reshape(D, -1)
            if name == "out":
                array = array.reshape(-1, D)
            matrices[f"{name} {layer}"] = array
    return matrices


def test_adafactor_equals_optax_on_each_layers_matrix():
    ours = optimizer(T5, schedule_offset=0, axes=AXES)
    theirs = optax.adafactor(learning_rate=schedule(T5))
    params, matrices = parameters(), layers_as_matrices(parameters())
    our_state, their_state = ours.init(params), theirs.init(matrices)
    for step in range(4):
        our_updates, our_state = jax.jit(ours.update)(gradients(step), our_state, params)
        their_updates, their_state = jax.jit(theirs.update)(layers_as_matrices(gradients(step)), their_state, matrices)
        params, matrices = optax.apply_updates(params, our_updates), optax.apply_updates(matrices, their_updates)
        for name, update in layers_as_matrices(our_updates).items():
            np.testing.assert_allclose(update, their_updates[name], rtol=1e-6, atol=1e-7 * np.abs(update).max())


def test_adafactor_on_a_stacked_leaf_equals_adafactor_on_each_layer():
    axes = {f"[{layer}]": AXES["['query']"] for layer in range(L)}
    stacked = optimizer(T5, schedule_offset=0, axes={"": AXES["['query']"]})
    separate = optimizer(T5, schedule_offset=0, axes=axes)
    params, grads = parameters()["query"], gradients(0)["query"]
    stacked_updates, _ = jax.jit(stacked.update)(grads, stacked.init(params), params)
    separate_updates, _ = jax.jit(separate.update)(list(grads), separate.init(list(params)), list(params))
    np.testing.assert_allclose(stacked_updates, np.stack(separate_updates), rtol=1e-6, atol=0)


def test_adafactor_keeps_a_row_and_a_column_per_layer_of_matrices_wide_enough():
    moments = optimizer(T5, schedule_offset=0, axes=AXES).init(parameters())[0]
    assert {key: leaf.shape for key, leaf in moments.row.items()} == {
        "['query']": (3, 128),
        "['out']": (3, 4, 40),
        "['mlp']": (3, 128),
        "['embedding']": (256,),
    }
    assert {key: leaf.shape for key, leaf in moments.column.items()} == {
        "['query']": (3, 4, 40),
        "['out']": (3, 128),
        "['mlp']": (3, 160),
        "['embedding']": (128,),
    }
    assert {key: leaf.shape for key, leaf in moments.full.items()} == {
        "['key']": (3, 128, 1, 40),
        "['norm']": (3, 128),
        "['position_bias']": (32, 4),
        "['final_norm']": (128,),
    }


def test_first_adafactor_update_has_rms_one_wherever_the_schedule_starts():
    config = dataclasses.replace(
        T5,
        schedule="constant",
        warmup_steps=None,
        learning_rate=1.0,
        clipping_threshold=None,
        multiply_by_parameter_scale=False,
    )
    leaf = jnp.ones((D, F))
    gradient = jnp.outer(jnp.linspace(1, 2, D), jnp.linspace(-3, 3, F))  # rank one: factoring is exact

    ours = optimizer(config, schedule_offset=1_000_000, axes={"": ("embed", "mlp")})
    update, _ = jax.jit(ours.update)(gradient, ours.init(leaf), leaf)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(update))), 1.0, rtol=1e-5)

    # The trap: a counter that starts at the original step, on fresh moments.
    continued = optax.scale_by_factored_rms()
    state = continued.init(leaf)._replace(count=jnp.asarray(1_000_000))
    update, _ = continued.update(gradient, state, leaf)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(update))), 251.2, rtol=2e-3)


def test_schedule_offset_moves_the_learning_rate():
    leaf, gradient = jnp.full((8,), 2.0), jnp.full((8,), 0.5)
    ours = optimizer(T5, schedule_offset=1_000_000, axes={"": ("embed",)})
    update, _ = jax.jit(ours.update)(gradient, ours.init(leaf), leaf)
    np.testing.assert_allclose(update, -1e-3 * 2.0, rtol=1e-5)  # rate 1/sqrt(10^6), parameter RMS 2, update RMS 1


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (T5, {0: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001}),
        (dataclasses.replace(T5, schedule="constant", warmup_steps=None, learning_rate=0.001), {0: 0.001, 9: 0.001}),
        (LLAMA2, {0: 0.0, 1000: 1.5e-4, 2000: 3e-4, 251_000: 1.65e-4, 500_000: 3e-5, 600_000: 3e-5}),
    ],
)
def test_schedule(config, rates):
    config.validate()
    rate = jax.jit(schedule(config))
    for step, expected in rates.items():
        np.testing.assert_allclose(rate(jnp.asarray(step)), expected, rtol=1e-4)
        assert rate(jnp.asarray(step)).dtype == jnp.float32


def test_adamw_equals_its_equations():
    config = dataclasses.replace(
        LLAMA2, schedule="constant", learning_rate=0.01, warmup_steps=None, decay_steps=None, final_ratio=None
    )
    ours = optimizer(config, schedule_offset=0, axes=AXES)
    params = parameters()
    state = ours.init(params)
    expected = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    first, second = ({name: np.zeros(leaf.shape) for name, leaf in params.items()} for _ in range(2))
    matrices = {"query", "out", "key", "mlp", "position_bias", "embedding"}
    for step in range(1, 4):
        updates, state = jax.jit(ours.update)(gradients(step), state, params)
        params = optax.apply_updates(params, updates)

        raw = {name: np.asarray(leaf, np.float64) for name, leaf in gradients(step).items()}
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in raw.values()))
        for name, leaf in raw.items():
            gradient = leaf / max(norm, 1.0)  # global norm clipped to 1
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * np.square(gradient)
            direction = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-5)
            decay = 0.1 * expected[name] if name in matrices else 0.0  # no decay on norm scales
            expected[name] = expected[name] - 0.01 * (direction + decay)
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-4, atol=1e-6)


class Block(nnx.Module):
    def __init__(self):
        self.query = nnx.Param(parameters()["query"])
        self.norms = nnx.List([nnx.Param(jnp.ones((D,)))])


BLOCK_AXES = {".query.value": ("embed", "heads", "head_dim"), ".norms[0].value": ("embed",)}


@pytest.mark.parametrize("config", [T5, LLAMA2])
def test_a_module_is_updated_as_a_module(config):
    ours = optimizer(config, schedule_offset=1000, axes=BLOCK_AXES)
    block = Block()
    updates, _ = jax.jit(ours.update)(jax.tree.map(jnp.ones_like, block), ours.init(block), block)
    updated = optax.apply_updates(block, updates)
    assert isinstance(updated, Block)
    assert jax.tree.structure(updated) == jax.tree.structure(block)
    assert np.all(np.asarray(updated.norms[0][...]) < 1.0)
    assert np.all(np.asarray(updated.query[...])[1] < np.asarray(block.query[...])[1])


def test_state_axes():
    ours = optimizer(dataclasses.replace(T5, clip_norm=1.0), schedule_offset=0, axes=BLOCK_AXES)
    assert state_axes(jax.eval_shape(ours.init, Block()), BLOCK_AXES) == {
        "[1].count": (),
        "[1].row['.query.value']": ("embed",),
        "[1].column['.query.value']": ("heads", "head_dim"),
        "[1].full['.norms[0].value']": ("embed",),
        "[2].count": (),
    }
    ours = optimizer(LLAMA2, schedule_offset=0, axes=BLOCK_AXES)
    assert state_axes(jax.eval_shape(ours.init, Block()), BLOCK_AXES) == {
        "[1].count": (),
        "[1].mu['.query.value']": ("embed", "heads", "head_dim"),
        "[1].mu['.norms[0].value']": ("embed",),
        "[1].nu['.query.value']": ("embed", "heads", "head_dim"),
        "[1].nu['.norms[0].value']": ("embed",),
        "[3].count": (),
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, r"parameter \['w'\] of shape \(2, 3\) has no logical axes"),
        ({"['w']": ()}, r"parameter \['w'\] of shape \(2, 3\) is no vector or matrix with axes \(\)"),
        ({"['w']": ("a", "b", "c")}, "is no vector or matrix"),
    ],
)
def test_axes_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        optimizer(T5, schedule_offset=0, axes=axes).init({"w": jnp.ones((2, 3))})


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (T5, {"name": "adam"}, "optimizer.name='adam'; expected one of adafactor, adamw; nearest: adamw"),
        (T5, {"schedule": "cosin"}, "expected one of rsqrt, constant, cosine; nearest: cosine"),
        (T5, {"decay_rate": None}, "optimizer.decay_rate is not set; adafactor with schedule rsqrt needs it"),
        (T5, {"beta1": 0.9}, "optimizer.beta1=0.9 belongs to adamw, not to adafactor with schedule rsqrt"),
        (T5, {"schedule": "constant"}, "optimizer.warmup_steps=10000 belongs to rsqrt and cosine"),
        (T5, {"learning_rate": 0.0}, "optimizer.learning_rate=0.0; expected a finite number above 0"),
        (T5, {"warmup_steps": 0}, "optimizer.warmup_steps=0; rsqrt expects at least 1; nearest: 1"),
        (LLAMA2, {"beta2": 1.0}, r"optimizer.beta2=1.0; expected a number in \[0, 1\); nearest: 0.0 or 0.999"),
        (LLAMA2, {"decay_steps": 2000}, "expected more than warmup_steps=2000; nearest: 2001"),
    ],
)
def test_validate_refuses(config, change, message):
    config.validate()
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **change).validate()
