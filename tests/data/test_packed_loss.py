"""Packing changes nothing: the loss of a packed row is the sum of the losses of its parts, each alone in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.data.examples import Supervised, make_task
from gqa.data.packing import packed_row
from gqa.objectives.language_model import cross_entropy

LENGTHS = (7, 12, 5)


@pytest.fixture(scope="module")
def row_losses(tiny_run, random_model):
    """A function (family, rows) -> the loss of each row of a tiny model."""
    compiled = {}

    def losses(family, rows):
        if family not in compiled:
            model = random_model(tiny_run(family).model.architecture())

            def row_loss(logits_TV, targets_T, weights_T):
                return cross_entropy(logits_TV, targets_T, weights_T, 0.0).loss_sum

            compiled[family] = jax.jit(
                lambda batch: jax.vmap(row_loss)(models.apply(model, batch), batch["targets"], batch["loss_weights"])
            )
        batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
        return np.asarray(compiled[family](batch), np.float64)

    return losses


def chunks_of(task):
    rng = np.random.default_rng(1)
    tokens = [rng.integers(3, 150, n) for n in LENGTHS]
    if isinstance(task, Supervised):
        return [task.chunk(chunk[: n // 2], chunk[n // 2 :]) for n, chunk in zip(LENGTHS, tokens, strict=True)]
    return [chunk.astype(np.int32) for chunk in tokens]


@pytest.mark.parametrize(
    ("name", "family"),
    [("span_corruption", "t5"), ("prefix_lm", "t5"), ("supervised", "t5"), ("causal_lm", "llama")],
)
def test_the_loss_of_packed_documents_is_the_sum_of_each_alone(name, family, row_losses):
    task = make_task(name, 32, None if family == "llama" else 32, 160)
    chunks = chunks_of(task)
    # Alone, a part is at the beginning of its row, under the noise that it has in the packed one.
    examples = [task.example(chunk, np.random.default_rng(i)) for i, chunk in enumerate(chunks)]
    fixed = _Fixed(task, examples)
    rows = [packed_row(range(len(chunks)), fixed, None), *(packed_row([i], fixed, None) for i in range(len(chunks)))]
    assert rows[0]["targets_segments"].max() == len(chunks)
    packed, *alone = row_losses(family, rows)
    assert packed == pytest.approx(sum(alone), rel=1e-5)
    assert min(alone) > 1


class _Fixed:
    """A task whose examples are drawn already."""

    def __init__(self, task, examples):
        self.inputs_length, self.targets_length = task.inputs_length, task.targets_length
        self._examples = examples

    def example(self, number, rng):
        return self._examples[number]
