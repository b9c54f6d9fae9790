"""Optimizers and learning-rate schedules: Adafactor as T5 was trained, AdamW as Llama 2 was.

Parameters come as any pytree of float32 arrays, with their logical axes in a dict keyed by
`jax.tree_util.keystr(path)`. A leaf with one dimension more than it has axes is stacked over layers (leading axis).
Every optimizer state below holds its arrays in dicts under those same keys, never in the caller's modules.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gqa.errors import InputError

# T5X `adafactor.py`; nobody tunes these.
MIN_DIM_SIZE_TO_FACTOR = 128  # a matrix with a smaller side keeps its whole second moment
SQUARED_GRADIENT_EPSILON = 1e-30  # Adafactor's epsilon_1
PARAMETER_SCALE_FLOOR = 1e-3  # Adafactor's epsilon_2

Axes = Mapping[str, tuple[str, ...]]  # key of a parameter -> its logical axes, without the stacked `layers`


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What turns gradients into updates. `None` means off, or belonging to another optimizer or schedule."""

    name: str  # adafactor | adamw
    schedule: str  # rsqrt | constant | cosine
    learning_rate: float  # constant: the rate; cosine: its peak; rsqrt: multiplier of 1/sqrt(step) (T5: 1.0)
    clip_norm: float | None = None  # largest global norm of the gradients (Llama 2: 1.0)
    warmup_steps: int | None = None  # rsqrt: steps at the first rate (T5: 10_000); cosine: linear rise (Llama 2: 2000)
    decay_steps: int | None = None  # cosine: step at which the rate reaches its end, warm-up included
    final_ratio: float | None = None  # cosine: end of the rate over its peak (Llama 2: 0.1)
    decay_rate: float | None = None  # adafactor: second moments decay by 1 - step^-decay_rate (T5: 0.8)
    clipping_threshold: float | None = None  # adafactor: largest RMS of an update, per layer and matrix (T5: 1.0)
    multiply_by_parameter_scale: bool | None = None  # adafactor: update in proportion to the weights' RMS (T5: True)
    beta1: float | None = None  # adamw: decay of the first moment (Llama 2: 0.9)
    beta2: float | None = None  # adamw: decay of the second moment (Llama 2: 0.95)
    epsilon: float | None = None  # adamw: added to the root of the second moment (Llama 2: 1e-5)
    weight_decay: float | None = None  # adamw: on matrices, never on vectors such as norm scales (Llama 2: 0.1)

    def validate(self) -> None:
        """Raises InputError on unknown names, on missing or unused settings, and on numbers out of range."""
        _one_of("name", self.name, ("adafactor", "adamw"))
        _one_of("schedule", self.schedule, ("rsqrt", "constant", "cosine"))
        for field, (owners, needed) in _OWNERS.items():
            value, used = getattr(self, field), self.name in owners or self.schedule in owners
            if used and needed and value is None:
                raise InputError(f"optimizer.{field} is not set; {self.name} with schedule {self.schedule} needs it")
            if not used and value is not None:
                raise InputError(
                    f"optimizer.{field}={value} belongs to {' and '.join(owners)}, not to {self.name} with schedule "
                    f"{self.schedule}; expected None"
                )
        for field, (expected, valid, nearest) in _RANGES.items():
            value = getattr(self, field)
            if value is not None and not valid(value):
                raise InputError(f"optimizer.{field}={value}; expected {expected}; nearest: {nearest}")
        if self.schedule == "rsqrt" and self.warmup_steps < 1:
            raise InputError(f"optimizer.warmup_steps={self.warmup_steps}; rsqrt expects at least 1; nearest: 1")
        if self.schedule == "cosine" and self.decay_steps <= self.warmup_steps:
            raise InputError(
                f"optimizer.decay_steps={self.decay_steps}; expected more than warmup_steps={self.warmup_steps}; "
                f"nearest: {self.warmup_steps + 1}"
            )


# field -> the optimizers or schedules it belongs to, and whether they need it
_OWNERS = {
    "decay_rate": (("adafactor",), True),
    "multiply_by_parameter_scale": (("adafactor",), True),
    "clipping_threshold": (("adafactor",), False),
    "beta1": (("adamw",), True),
    "beta2": (("adamw",), True),
    "epsilon": (("adamw",), True),
    "weight_decay": (("adamw",), False),
    "warmup_steps": (("rsqrt", "cosine"), True),
    "decay_steps": (("cosine",), True),
    "final_ratio": (("cosine",), True),
}

# field -> what is expected of it, the test, the nearest valid value
_POSITIVE = ("a finite number above 0", lambda value: 0 < value < math.inf, "1e-6 or 1.0")
_FRACTION = ("a number in [0, 1)", lambda value: 0 <= value < 1, "0.0 or 0.999")
_RANGES = {
    "learning_rate": _POSITIVE,
    "clip_norm": _POSITIVE,
    "epsilon": _POSITIVE,
    "decay_rate": ("a number in (0, 1]", lambda value: 0 < value <= 1, "0.8 or 1.0"),
    "clipping_threshold": ("a finite number of at least 1", lambda value: 1 <= value < math.inf, "1.0"),
    "beta1": _FRACTION,
    "beta2": _FRACTION,
    "weight_decay": ("a finite number of at least 0", lambda value: 0 <= value < math.inf, "0.0"),
    "warmup_steps": ("0..2147483647", lambda value: 0 <= value < 2**31, "0 or 2147483647"),  # steps are int32
    "final_ratio": ("a number in [0, 1]", lambda value: 0 <= value <= 1, "0.0 or 1.0"),
}


def _one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise InputError(f"optimizer.{field}={value!r}; expected one of {', '.join(choices)}; nearest: {nearest}")


def schedule(config: OptimizerConfig) -> Callable[[jax.Array], jax.Array]:
    """Learning rate as a function of the step (int32, counted from 0 over the whole of training)."""
    match config.schedule:
        case "rsqrt":  # T5 §3.1.2: 1/sqrt(max(step, 10^4))
            return lambda step: (
                config.learning_rate / jnp.sqrt(jnp.maximum(step, config.warmup_steps).astype(jnp.float32))
            )
        case "constant":
            return lambda step: jnp.full_like(step, config.learning_rate, dtype=jnp.float32)
        case "cosine":
            return optax.warmup_cosine_decay_schedule(
                init_value=0.0,
                peak_value=config.learning_rate,
                warmup_steps=config.warmup_steps,
                decay_steps=config.decay_steps,
                end_value=config.learning_rate * config.final_ratio,
            )
    raise AssertionError(config.schedule)


def optimizer(config: OptimizerConfig, schedule_offset: int, axes: Axes) -> optax.GradientTransformation:
    """The optimizer of a run, for any pytree of arrays; moments are float32 whatever the parameters are.

    `schedule_offset` moves the learning rate alone: uptraining goes on with the original schedule at the original
    step, while moments and their counters start afresh. (Adafactor's decay at step 10^6 on moments of zero would make
    the first update's RMS 251 instead of 1, before it is clipped.)

    Raises ValueError at `init` and `update` where a leaf has no axes or their number does not fit its shape.
    """
    rate = schedule(config)
    steps = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    if config.name == "adafactor":
        steps.append(_scale_by_adafactor(config, axes))
    else:
        steps.append(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon))
        if config.weight_decay is not None:
            is_matrix = {key: len(_matrix_sides(names)) == 2 for key, names in axes.items()}
            steps.append(
                optax.add_decayed_weights(
                    config.weight_decay, mask=lambda parameters: {key: is_matrix[key] for key in parameters}
                )
            )
    steps.append(optax.scale_by_learning_rate(lambda step: rate(step + schedule_offset)))
    by_key = optax.chain(*steps)

    def in_float32(tree):
        return {key: leaf.astype(jnp.float32) for key, leaf in _keyed(tree, axes).items()}

    def init(parameters):
        return by_key.init(in_float32(parameters))

    def update(gradients, state, parameters):
        keyed = in_float32(gradients)
        updates, state = by_key.update(keyed, state, in_float32(parameters))
        return jax.tree.unflatten(jax.tree.structure(gradients), [updates[key] for key in keyed]), state

    return optax.GradientTransformation(init, update)


def state_axes(state: Any, axes: Axes) -> dict[str, tuple[str, ...]]:
    """Logical axes of every array in an optimizer's state (or its `jax.eval_shape`), keyed by `keystr` of its path.

    As with parameters, an array with one dimension more than axes is stacked over layers. Counters have no axes.
    """
    result = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = axes.get(getattr(path[-1], "key", None), ())
        side = {"row": 0, "column": 1}.get(getattr(path[-2], "name", None)) if len(path) > 1 else None
        if side is not None:
            names = tuple(names[dimension] for dimension in _matrix_sides(names)[side])
        result[jax.tree_util.keystr(path)] = names
    return result


class AdafactorState(NamedTuple):
    """Second moments by parameter: `row` and `column` of the factored ones, `full` of the others.

    A row keeps the dimensions of its matrix' first side, a column those of the second, both after the stacked one:
    `[L, D, H, d]` has row `[L, D]` and column `[L, H, d]`.
    """

    count: jax.Array
    row: dict[str, jax.Array]
    column: dict[str, jax.Array]
    full: dict[str, jax.Array]


def _scale_by_adafactor(config: OptimizerConfig, axes: Axes) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, algorithms 4 and 5) without a first moment, on dicts of float32 arrays.

    Moments, clipping and parameter scale are of one layer's matrix, with heads and head_dim as one side:
    `optax.adafactor` would not factor `[24, 4096, 64, 64]` at all, and would clip and scale all layers as one.
    """

    def init(parameters):
        row, column, full = {}, {}, {}
        for key, parameter in parameters.items():
            sides = _matrix_sides(axes[key])
            layers = parameter.shape[: parameter.ndim - len(axes[key])]
            shape = parameter.shape[len(layers) :]
            if _is_factored(shape, sides):
                row[key], column[key] = (
                    jnp.zeros(layers + tuple(shape[dimension] for dimension in side), jnp.float32) for side in sides
                )
            else:
                full[key] = jnp.zeros(parameter.shape, jnp.float32)
        return AdafactorState(jnp.zeros([], jnp.int32), row, column, full)

    def update(gradients, state, parameters):
        decay = 1.0 - (state.count + 1.0) ** -config.decay_rate
        updates, row, column, full = {}, {}, {}, {}
        for key, gradient in gradients.items():
            if key in state.row:
                rows, columns = _matrix_sides(axes[key])

                def matrix(gradient, parameter, row, column, rows=rows, columns=columns):
                    squared = jnp.square(gradient) + SQUARED_GRADIENT_EPSILON
                    row = decay * row + (1.0 - decay) * jnp.mean(squared, axis=columns)
                    column = decay * column + (1.0 - decay) * jnp.mean(squared, axis=rows)
                    scale = jnp.expand_dims((row / jnp.mean(row)) ** -0.5, columns) * jnp.expand_dims(
                        column**-0.5, rows
                    )
                    return _clip_and_scale(config, gradient * scale, parameter), row, column

                over_layers = _over_layers(matrix, gradient, axes[key])
                updates[key], row[key], column[key] = over_layers(
                    gradient, parameters[key], state.row[key], state.column[key]
                )
            else:

                def unfactored(gradient, parameter, full):
                    full = decay * full + (1.0 - decay) * (jnp.square(gradient) + SQUARED_GRADIENT_EPSILON)
                    return _clip_and_scale(config, gradient * full**-0.5, parameter), full

                over_layers = _over_layers(unfactored, gradient, axes[key])
                updates[key], full[key] = over_layers(gradient, parameters[key], state.full[key])
        return updates, AdafactorState(optax.safe_increment(state.count), row, column, full)

    return optax.GradientTransformation(init, update)


def _clip_and_scale(config: OptimizerConfig, update: jax.Array, parameter: jax.Array) -> jax.Array:
    if config.clipping_threshold is not None:
        update /= jnp.maximum(1.0, _rms(update) / config.clipping_threshold)
    if config.multiply_by_parameter_scale:
        update *= jnp.maximum(_rms(parameter), PARAMETER_SCALE_FLOOR)
    return update


def _rms(array: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(array)))


def _over_layers(function: Callable, leaf: jax.Array, names: tuple[str, ...]) -> Callable:
    return jax.vmap(function) if leaf.ndim > len(names) else function


def _is_factored(shape: tuple[int, ...], sides: tuple[tuple[int, ...], ...]) -> bool:
    sizes = [math.prod(shape[dimension] for dimension in side) for side in sides]
    return len(sizes) == 2 and min(sizes) >= MIN_DIM_SIZE_TO_FACTOR


def _matrix_sides(names: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Dimensions of each side of the matrix that a leaf is: `(embed, heads, head_dim)` gives `((0,), (1, 2))`.

    A vector or a bias `(heads, head_dim)` has one side.
    """
    sides: list[tuple[int, ...]] = []
    for dimension, name in enumerate(names):
        if name == "head_dim" and dimension and names[dimension - 1] in ("heads", "kv_heads"):
            sides[-1] += (dimension,)
        else:
            sides.append((dimension,))
    return tuple(sides)


def _keyed(tree: Any, axes: Axes) -> dict[str, jax.Array]:
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for key, leaf in leaves.items():
        if key not in axes:
            raise ValueError(f"parameter {key} of shape {leaf.shape} has no logical axes")
        if leaf.ndim - len(axes[key]) not in (0, 1) or len(_matrix_sides(axes[key])) > 2:
            raise ValueError(f"parameter {key} of shape {leaf.shape} is no vector or matrix with axes {axes[key]}")
    return leaves
