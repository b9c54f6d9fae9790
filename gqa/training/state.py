"""What training carries from step to step, born sharded, and the step itself."""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa.models import Model
from gqa.objectives.language_model import Sums
from gqa.sharding import batch_sharding, constrain, logical_axes, parameter_shardings, shardings
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
    if callable(model) and not isinstance(model, nnx.Module):
        return jax.jit(lambda: _initial(model(), optimizer), out_shardings=placed)()
    return jax.jit(lambda model: _initial(model, optimizer), out_shardings=placed)(model)


def _initial(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))


def make_train_step(
    loss_fn: Callable[..., Sums],
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    accumulation: int,
    seed: int,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One optimizer step, `(state, batch, *frozen) -> (state, metrics)`, pure and to be jitted with a donated state.

    `loss_fn(model, batch, key, step, *frozen)` returns sums over tokens; `frozen` has no gradient. Gradients are
    normalised by the weight of the whole batch, over all devices and micro-batches, so that `accumulation` changes
    memory and nothing else.
    """

    def total(model, batch, key, step, *frozen):
        sums = loss_fn(model, batch, key, step, *frozen)
        return sums.loss_sum + sums.z_loss_sum + sums.added_sum, sums

    gradient_of_total = jax.grad(total, has_aux=True)

    def accumulated(model, batch, key, step, *frozen):
        if accumulation == 1:
            return gradient_of_total(model, batch, key, step, *frozen)

        def split(x):  # strided, so that every device keeps the rows it has
            x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
            return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

        def body(carry, micro_batch_and_number):
            micro_batch, number = micro_batch_and_number
            new = gradient_of_total(model, micro_batch, jax.random.fold_in(key, number), step, *frozen)
            return jax.tree.map(jnp.add, carry, new), None

        micro_batches = jax.tree.map(split, batch)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient_of_total, model, jax.tree.map(lambda x: x[0], micro_batches), key, step, *frozen),
        )
        return jax.lax.scan(body, zeros, (micro_batches, jnp.arange(accumulation)))[0]

    def train_step(state: TrainState, batch: Batch, *frozen) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, sums = accumulated(state.model, batch, key, state.step, *frozen)
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
            **{name: value / jnp.maximum(weight, 1e-9) for name, (value, weight) in sums.named.items()},
        }
        return TrainState(state.step + 1, optax.apply_updates(state.model, updates), optimizer_state), metrics

    return train_step


def jit_train_step(train_step: Callable, like: TrainState) -> Callable:
    """`train_step` compiled: the state is donated, and each of its arrays stays where `like` has it."""
    # Left to itself, XLA gives the new state shardings of its own choice: the second step would compile again.
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))


def place_batch(mesh: Mesh, batch: Mapping) -> Batch:
    """Puts a host batch on the devices, rows over `data` and `fsdp`."""
    return {name: jax.device_put(array, batch_sharding(mesh, array.shape)) for name, array in batch.items()}


def digest(model: Model) -> str:
    """SHA-256 of a model's configuration and parameters."""
    found = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(model):
        found.update(np.asarray(jax.device_get(leaf)).tobytes())
    return found.hexdigest()
