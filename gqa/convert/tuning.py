"""Layer-wise reconstruction: a converted attention trained, by itself, to give the output of the one that it replaces.

What BRECQ (arXiv 2102.05426) does for quantised blocks, for shared heads. Where closed forms take queries and keys as
independent and all pairs of tokens as equal, this sees the weights that the attention gives; with RoPE, where keys are
free in one complex number a frequency only, most of what they lose comes back. Only the attention's own kernels move,
no token is predicted, and no other layer takes part.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from gqa.convert import walk
from gqa.errors import InputError
from gqa.nn.attention import GroupedQueryAttention

ROWS = 2  # of a step
PASSES = 4  # over the calibration rows
LEARNING_RATE = 0.12  # at the start of its cosine, times the output's relative error: of a kernel's root mean square
JUDGES = 8  # one of so many steps' rows is not trained on: they say whether training helped
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)
_TINY = 1e-30


class _Batch(NamedTuple):
    """Rows before a layer, and the output of its unconverted attention on them."""

    x: jax.Array  # [B, T, D]
    batch: dict[str, jax.Array]
    encoded: jax.Array | None
    output: jax.Array  # [B, T, D]


class _Site(NamedTuple):
    """What a compiled step is made for."""

    side: str
    name: str  # of the attention
    rows: int  # of a step


class _Part(NamedTuple):
    """Some rows of a batch."""

    batch: _Batch
    first: int


def tune(stream: walk.Stream, layer: nnx.Module, converted: GroupedQueryAttention, name: str) -> GroupedQueryAttention:
    """`converted` after training towards the output of attention `name` of `layer`, on the rows of `stream`.

    `converted` itself where that is no better on the rows kept back. Raises `InputError` if there is nothing to keep
    back.
    """
    batches = []
    for shell, _, x, batch, encoded in stream.arguments((layer,)):
        output = _output(shell, layer, x, batch, encoded, side=stream.side, name=name)
        batches.append(_Batch(x, {key: jnp.asarray(value) for key, value in batch.items()}, encoded, output))
    rows = ROWS if min(len(batch.x) for batch in batches) >= 2 * ROWS else 1
    parts = [_Part(batch, first) for batch in batches for first in range(0, len(batch.x) - rows + 1, rows)]
    every = min(JUDGES, len(parts))
    judges = parts[every - 1 :: every]
    parts = [part for number, part in enumerate(parts, 1) if number % every]
    if not parts:
        raise InputError("tune keeps a row back to judge itself by and there is one row; give more, better 64 or more")
    site = _Site(stream.side, name, rows)

    def judged(attention) -> float:
        """`‖made - output‖ / ‖output‖` on the rows kept back."""
        sums = np.sum([_missed(attention, shell, layer, *part, site) for part in judges], axis=0)
        return float(np.sqrt(sums[0] / sums[1])) if sums[1] > 0 else 0.0

    attention = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), converted)  # copies: steps reuse their memory
    size = jax.tree.map(lambda leaf: jnp.sqrt(jnp.mean(jnp.square(leaf))), attention)
    state = _ADAM.init(attention)
    steps, order = PASSES * len(parts), np.random.default_rng(0)
    before = judged(converted)
    with tqdm(total=steps, desc=f"tune {name}", unit="step", delay=5, leave=False) as bar:
        for number in range(steps):
            if number % len(parts) == 0:
                permuted = order.permutation(len(parts))
            part = parts[permuted[number % len(parts)]]
            # What is nearly right is moved little: at one rate for all, good conversions would be made worse first.
            rate = LEARNING_RATE * before * 0.5 * (1 + np.cos(np.pi * number / steps))
            attention, state = _train(attention, state, size, rate, shell, layer, *part, site)
            bar.update()
    attention = jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), attention, converted)
    # Not so where nothing was left to gain, nor where there are few rows for so many parameters.
    return attention if judged(attention) < before else converted


@partial(jax.jit, static_argnames=("side", "name"))
def _output(shell, layer, x, batch, encoded, side, name):
    return walk.recorded(shell, layer, x, batch, encoded, side, {name: getattr(layer, name)})[1][0].output


@partial(jax.jit, static_argnames="site")
def _missed(attention, shell, layer, batch: _Batch, first, site: _Site):
    """`‖made - output‖²` and `‖output‖²` of some rows' real tokens."""
    x, of_rows, encoded, output = jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, first, site.rows), batch
    )
    made = walk.recorded(shell, layer, x, of_rows, encoded, site.side, {site.name: attention})[1][0].output
    real = walk.real_tokens(of_rows, site.side).reshape(*output.shape[:2], 1)
    made, output = (array.astype(jnp.float32) * real for array in (made, output))
    return jnp.sum(jnp.square(made - output)), jnp.sum(jnp.square(output))


@partial(jax.jit, static_argnames="site", donate_argnames=("attention", "state"))
def _train(attention, state, size, rate, shell, layer, batch: _Batch, first, site: _Site):
    def loss(attention):
        missed, there = _missed(attention, shell, layer, batch, first, site)
        return missed / (there + _TINY)

    # In units of each kernel's size, as if it were a kernel of size one.
    gradient = jax.tree.map(jnp.multiply, jax.grad(loss)(attention), size)
    updates, state = _ADAM.update(gradient, state)
    return jax.tree.map(lambda leaf, update, unit: leaf - rate * unit * update, attention, updates, size), state
