"""What tests of the command lines share."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.checkpoints import hf_config
from gqa.checkpoints.store import Store


class State(NamedTuple):
    """As training's."""

    step: jax.Array
    model: models.Model


@pytest.fixture
def save_run():
    """A function (folder, model, vocabulary) that writes what a run that trains that model has at step 7."""

    def save(workdir, model, vocabulary="none.model") -> None:
        with Store(workdir / "checkpoints", keep=1) as store:
            store.save(7, State(jnp.int32(7), model))
        (workdir / "architecture.json").write_text(json.dumps(hf_config.write(model.config, "float32", None)))
        (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(vocabulary)}, "train": {}}))

    return save


@pytest.fixture
def assert_equal():
    """A function that asserts that two models are the same, bit for bit."""

    def check(left, right) -> None:
        assert left.config == right.config
        assert jax.tree.structure(left) == jax.tree.structure(right)
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(one, other)

    return check
