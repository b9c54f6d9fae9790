"""What training carries from step to step, born sharded, and the step itself."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.models import Model
from gqa.objectives.language_model import Sums
from gqa.sharding import constrain, logical_axes, parameter_shardings, place_rows, shardings
from gqa.training import optimizer as optimizers

Batch = Mapping[str, jax.Array]


class TrainState(NamedTuple):
    """The whole of a run: with the config and this, every later step follows."""

    step: jax.Array  # int32, steps done
    model: Model  # master parameters
    optimizer: optax.OptState


def state_shardings(mesh: Mesh, abstract_state: TrainState) -> TrainState:
    """Where each array of a state lives: optimizer moments beside their parameters."""
    axes = logical_axes(abstract_state.model)
    return TrainState(
        NamedSharding(mesh, PartitionSpec()),
        parameter_shardings(mesh, abstract_state.model),
        shardings(mesh, abstract_state.optimizer, optimizers.state_axes(abstract_state.optimizer, axes)),
    )


def abstract_state(abstract_model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state; nothing is allocated."""
    state = jax.eval_shape(lambda model: _initial(model, optimizer), abstract_model)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )


def initial_state(
    model: Model | Callable[[], Model], optimizer: optax.GradientTransformation, like: TrainState
) -> TrainState:
    """The state of step 0 for a model, or for a function that initialises one, created in place on its devices."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    if callable(model) and not isinstance(model, Model):
        return jax.jit(lambda: _initial(model(), optimizer), out_shardings=placed)()
    return jax.jit(lambda model: _initial(model, optimizer), out_shardings=placed)(model)


def _initial(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))


def make_train_step(
    loss_fn: Callable[[Model, Batch, jax.Array, jax.Array], Sums],
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    accumulation: int,
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimizer step as a pure function, to be jitted with a donated state.

    `loss_fn(model, batch, key, step)` returns sums over tokens; gradients are normalised by the weight of the whole
    batch, over all devices and micro-batches, so that `accumulation` changes memory and nothing else.
    """

    def total(model, batch, key, step):
        sums = loss_fn(model, batch, key, step)
        return sums.loss_sum + sums.z_loss_sum + sums.added_sum, sums

    gradient_of_total = jax.grad(total, has_aux=True)

    def accumulated(model, batch, key, step):
        if accumulation == 1:
            return gradient_of_total(model, batch, key, step)

        def split(x):  # strided, so that every device keeps the rows it has
            x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
            return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

        def body(carry, micro_batch_and_number):
            micro_batch, number = micro_batch_and_number
            new = gradient_of_total(model, micro_batch, jax.random.fold_in(key, number), step)
            return jax.tree.map(jnp.add, carry, new), None

        micro_batches = jax.tree.map(split, batch)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient_of_total, model, jax.tree.map(lambda x: x[0], micro_batches), key, step),
        )
        return jax.lax.scan(body, zeros, (micro_batches, jnp.arange(accumulation)))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, sums = accumulated(state.model, batch, key, state.step)
        gradients = jax.tree.map(lambda gradient: gradient / sums.weight_sum, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.model)
        metrics = {
            "loss": sums.loss_sum / sums.weight_sum,
            "z_loss": sums.z_loss_sum / sums.weight_sum,
            "accuracy": sums.correct_sum / sums.weight_sum,
            "target_tokens": sums.weight_sum,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": learning_rate(state.step),
            "added_loss": sums.added_sum / sums.weight_sum,
        }
        return TrainState(state.step + 1, optax.apply_updates(state.model, updates), optimizer_state), metrics

    return train_step


def jit_train_step(train_step: Callable, like: TrainState) -> Callable:
    """`train_step` compiled: the state is donated, and each of its arrays stays where `like` has it."""
    # Left to itself, XLA gives the new state shardings of its own choice: the second step would compile again.
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))


def place_batch(mesh: Mesh, batch: Mapping) -> Batch:
    """Puts a host batch, or this process's rows of one, on the devices, rows over the batch's mesh axes."""
    return {name: place_rows(mesh, array) for name, array in batch.items()}
