"""The store of training states: bit for bit, whatever becomes of the state meanwhile."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.checkpoints.store import Store
from gqa.errors import InputError


def state_of(seed: int) -> dict:
    """One array of each kind that a state has."""
    rng = np.random.default_rng(seed)
    return {
        "step": jnp.int32(seed),
        "kernel": jnp.asarray(rng.normal(size=(2, 256, 128)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16),
        "moments": ({"['a'].row": jnp.asarray(rng.normal(size=7), jnp.float32)}, None, []),
    }


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def test_a_state_comes_back(tmp_path):
    with Store(tmp_path / "checkpoints", keep=2) as store:
        assert store.latest_step() is None
        store.save(3, state_of(3))
        store.save(5, state_of(5))
        store.wait()
    with Store(tmp_path / "checkpoints", keep=2) as store:
        assert store.latest_step() == 5
        for step in (3, 5):
            restored = store.restore(step, abstract(state_of(0)))
            assert_equal(restored, state_of(step))
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_the_newest_stay(tmp_path):
    with Store(tmp_path, keep=2) as store:
        for step in (1, 2, 3, 4):
            store.save(step, state_of(step))
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """On a CPU the host's copy of an array may be the array itself, which the next step overwrites."""
    step_fn = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    with Store(tmp_path, keep=4) as store:
        for step in (1, 2, 3):
            state = state_of(step)
            store.save(step, state)
            state = step_fn(state)
            assert int(state["step"]) == -1
        store.wait()
        for step in (1, 2, 3):
            assert_equal(store.restore(step, abstract(state_of(0))), state_of(step))


@pytest.mark.parametrize("next_step", [2, 3])
def test_an_unfinished_checkpoint_is_none(tmp_path, next_step):
    """What a kill left of step 2 is neither found nor kept, whether or not step 2 is ever saved again."""
    with Store(tmp_path, keep=2) as store:
        store.save(1, state_of(1))
    (tmp_path / "2.unfinished").mkdir()
    (tmp_path / "2.unfinished" / "part").write_bytes(b"half")
    with Store(tmp_path, keep=2) as store:
        assert store.latest_step() == 1
        store.save(next_step, state_of(next_step))
        store.wait()
        assert_equal(store.restore(next_step, abstract(state_of(0))), state_of(next_step))
    assert sorted(os.listdir(tmp_path)) == ["1", str(next_step)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.zeros((2, 256, 64))}, "['kernel'] has shape (2, 256, 128), expected (2, 256, 64)"),
        ({"scale": jnp.zeros(4)}, "['scale'] has shape None, expected (4,)"),
        ({"half": None}, "['half'] has shape (3, 5), expected None"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    with Store(tmp_path, keep=1) as store:
        store.save(7, state_of(7))
        store.wait()
        with pytest.raises(InputError) as caught:
            store.restore(7, abstract(state_of(7) | change))
    assert str(caught.value) == f"checkpoint of step 7 is of another model: {message}"
