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
from gqa.sharding import constrain, logical_axes, parameter_shardings, place_rows, shardings
from gqa.training import optimizer as optimizers

Batch = Mapping[str, jax.Array]


_WINDOW = 100  # steps that the running means look back over
_WARM_UP = 20  # steps before a loss or gradient can be called high


class Health(NamedTuple):
    """How the steps went so far, by which the next one is judged."""

    loss: jax.Array  # float32, running mean
    grad_norm: jax.Array  # float32, running mean
    steps: jax.Array  # int32, in the means
    skipped: jax.Array  # int32, steps whose update was left out
    in_a_row: jax.Array  # int32, of these the ones just now


class TrainState(NamedTuple):
    """The whole of a run: with the config and this, every later step follows."""

    step: jax.Array  # int32, steps done
    model: Model  # master parameters
    optimizer: optax.OptState
    batch: jax.Array  # int32, index of the next batch: `step`, unless a roll-back passed over some
    health: Health


def state_shardings(mesh: Mesh, abstract_state: TrainState) -> TrainState:
    """Where each array of a state lives: optimizer moments beside their parameters."""
    axes = logical_axes(abstract_state.model)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        everywhere,
        parameter_shardings(mesh, abstract_state.model),
        shardings(mesh, abstract_state.optimizer, optimizers.state_axes(abstract_state.optimizer, axes)),
        everywhere,
        jax.tree.map(lambda _: everywhere, abstract_state.health),
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
    count, mean = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    health = Health(loss=mean, grad_norm=mean, steps=count, skipped=count, in_a_row=count)
    return TrainState(count, model, optimizer.init(model), batch=count, health=health)


def _judge(health: Health, loss: jax.Array, grad_norm: jax.Array, skip_above: float | None):
    """Whether a step's update is to be applied, and the health after it."""

    def limit(mean):
        if skip_above is None:
            return jnp.inf
        return jnp.where(health.steps < _WARM_UP, jnp.inf, skip_above * mean)

    good = jnp.isfinite(loss) & (loss <= limit(health.loss))
    good &= jnp.isfinite(grad_norm) & (grad_norm <= limit(health.grad_norm))

    def mean(old, new):
        # High values count as the limit: where the level has changed for good, the mean comes after it.
        new = jnp.where(jnp.isfinite(new), jnp.minimum(new, limit(old)), old)
        return old + (new - old) / jnp.minimum(health.steps + 1, _WINDOW)

    bad = 1 - good.astype(jnp.int32)
    return good, Health(
        loss=mean(health.loss, loss),
        grad_norm=mean(health.grad_norm, grad_norm),
        steps=health.steps + (jnp.isfinite(loss) & jnp.isfinite(grad_norm)),  # of which the means are
        skipped=health.skipped + bad,
        in_a_row=(health.in_a_row + 1) * bad,
    )


def make_train_step(
    loss_fn: Callable[..., Sums],
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    accumulation: int,
    seed: int,
    skip_above: float | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One optimizer step, `(state, batch, *frozen) -> (state, metrics)`, pure and to be jitted with a donated state.

    `loss_fn(model, batch, key, step, *frozen)` returns sums over tokens; `frozen` has no gradient. Gradients are
    normalised by the weight of the whole batch, over all devices and micro-batches, so that `accumulation` changes
    memory and nothing else.

    A step whose loss or gradient norm is not finite, or above `skip_above` times its running mean, leaves parameters
    and moments as they are, decided on the devices; counters go on, so that schedules stay functions of the step.
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
        zeros = jax.tree.map(  # in float32, also of bfloat16 parameters: small gradients add up
            lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)),
            jax.eval_shape(gradient_of_total, model, jax.tree.map(lambda x: x[0], micro_batches), key, step, *frozen),
        )
        return jax.lax.scan(body, zeros, (micro_batches, jnp.arange(accumulation)))[0]

    def train_step(state: TrainState, batch: Batch, *frozen) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, sums = accumulated(state.model, batch, key, state.step, *frozen)
        gradients = jax.tree.map(lambda gradient: gradient.astype(jnp.float32) / sums.weight_sum, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.model)
        loss, grad_norm = sums.loss_sum / sums.weight_sum, optax.tree.norm(gradients)
        good, health = _judge(state.health, loss, grad_norm, skip_above)

        def applied(new, old):
            return jnp.where(good, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

        model = jax.tree.map(applied, optax.apply_updates(state.model, updates), state.model)
        optimizer_state = jax.tree.map(applied, optimizer_state, state.optimizer)
        metrics = {
            "loss": loss,
            "z_loss": sums.z_loss_sum / sums.weight_sum,
            "accuracy": sums.correct_sum / sums.weight_sum,
            "target_tokens": sums.weight_sum,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(state.step),
            "added_loss": sums.added_sum / sums.weight_sum,
            "batch": state.batch,
            "skipped_steps": health.skipped,
            "skipped_in_a_row": health.in_a_row,
            **{name: value / jnp.maximum(weight, 1e-9) for name, (value, weight) in sums.named.items()},
        }
        return TrainState(state.step + 1, model, optimizer_state, state.batch + 1, health), metrics

    return train_step


def jit_train_step(train_step: Callable, like: TrainState) -> Callable:
    """`train_step` compiled: the state is donated, and each of its arrays stays where `like` has it."""
    # Left to itself, XLA gives the new state shardings of its own choice: the second step would compile again.
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))


def place_batch(mesh: Mesh, batch: Mapping) -> Batch:
    """Puts a host batch, or this process's rows of one, on the devices, rows over the batch's mesh axes."""
    return {name: place_rows(mesh, array) for name, array in batch.items()}


def digest(model: Model) -> str:
    """SHA-256 of a model's configuration and parameters."""
    found = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(model):
        found.update(np.asarray(jax.device_get(leaf)).tobytes())
    return found.hexdigest()
