import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.decode import generate
from gqa.decode.generate import PAD_ID
from gqa.decode.sampling import sampling
from gqa.errors import InputError
from gqa.models.quantize import quantize

N = 6  # new tokens
NAMES = ["t5_1_1_mini", "llama_mini"]


@functools.cache
def model(name, seed=3, **changes):
    return models.create(dataclasses.replace(models.size(name), **changes), jax.random.key(seed))


def sequences(batch, length, *, seed=0):
    return np.random.default_rng(seed).integers(2, 256, (batch, length), dtype=np.int32)


def tokens_of(network, inputs, lengths=None, *, eos_ids=(), **settings):
    """New tokens; what follows a row's own is padding."""
    state = generate.generate(network, inputs, lengths, max_new_tokens=N, eos_ids=eos_ids, **settings)
    tokens, counts = np.asarray(state.tokens_BN), np.asarray(state.counts_B)
    assert (tokens[np.arange(N) >= counts[:, None]] == PAD_ID).all()
    return tokens


def argmax_t5(network, inputs, segments, tokens):
    """The most likely token after each prefix of `tokens`, by one forward: greedy tokens reproduce themselves."""
    shifted = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
    logits = jax.jit(lambda model: model(inputs, shifted, inputs_segments_BS=segments))(network)
    return np.asarray(jnp.argmax(logits, axis=-1))


def argmax_llama(network, prompts, tokens):
    """The same after prompts without padding between them and the tokens."""
    rows = [np.concatenate([prompt, row]) for prompt, row in zip(prompts, tokens, strict=True)]
    padded = np.stack([np.pad(row, (0, 20 - len(row))) for row in rows])
    argmax = np.asarray(jnp.argmax(jax.jit(lambda model: model(padded))(network), axis=-1))
    starts = [len(prompt) - 1 for prompt in prompts]
    return np.stack([row[start : start + N] for row, start in zip(argmax, starts, strict=True)])


def cut(tokens, eos_ids):
    """`tokens` with everything after a row's first EOS replaced by padding."""
    is_eos = np.isin(tokens, eos_ids)
    return np.where(np.cumsum(is_eos, axis=1) - is_eos > 0, PAD_ID, tokens)


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.full), 2, (4, 1)])
def test_t5_equals_the_full_forward(kv_heads):
    t5 = model("t5_1_1_mini", decoder_self_kv_heads=kv_heads, cross_kv_heads=kv_heads)
    inputs = sequences(3, 7)
    segments = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    tokens = tokens_of(t5.unstacked(), inputs, [7, 4, 1])
    np.testing.assert_array_equal(tokens, argmax_t5(t5, inputs, segments, tokens))
    assert len({tuple(row) for row in tokens}) == 3, "rows should differ for the test to mean something"


@pytest.mark.parametrize("changes", [{"decoder_self_kv_heads": K} for K in (4, 2, (1, 4))] + [{"sliding_window": 3}])
def test_llama_equals_the_full_forward_of_prompts_without_padding(changes):
    llama = model("llama_mini", **changes)
    lengths = [5, 2, 1]
    prompts = [row[:length] for row, length in zip(sequences(3, 5), lengths, strict=True)]
    # Padding is not 0: what it is must not matter.
    padded = np.stack([np.concatenate([prompt, np.full(5 - len(prompt), 99)]) for prompt in prompts]).astype(np.int32)
    tokens = tokens_of(llama.unstacked(), padded, lengths)
    np.testing.assert_array_equal(tokens, argmax_llama(llama, prompts, tokens))
    assert len({tuple(row) for row in tokens}) == 3, "rows should differ for the test to mean something"


@pytest.mark.parametrize("name", NAMES)
def test_stacked_and_unstacked_models_decode_alike(name):
    inputs = sequences(2, 1)
    np.testing.assert_array_equal(tokens_of(model(name), inputs), tokens_of(model(name).unstacked(), inputs))


@pytest.mark.parametrize("name", NAMES)
def test_rows_end_at_any_eos(name):
    network, inputs = model(name), sequences(4, 5)
    free = tokens_of(network, inputs)
    eos_ids = [int(free[0, 1]), int(free[2, -1])]
    tokens = tokens_of(network, inputs, eos_ids=eos_ids)
    np.testing.assert_array_equal(tokens, cut(free, eos_ids))
    assert all((tokens == eos_id).any() for eos_id in eos_ids)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_there_change_nothing(name):
    network, inputs = model(name), sequences(2, 5)
    padded = np.concatenate([inputs, np.zeros((2, 5), np.int32)])
    tokens = tokens_of(network, padded, [5, 5, 0, 0])
    np.testing.assert_array_equal(tokens[:2], tokens_of(network, inputs))
    assert (tokens[2:] == PAD_ID).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_takes_no_more_steps_than_needed(name, monkeypatch):
    # A configuration that no other test has compiled.
    network, inputs = model(name, norm_epsilon=3e-6), sequences(2, 5)
    steps, decode_step = [], type(network).decode_step

    def counted(self, tokens_BT, cache):
        if tokens_BT.shape[1] == 1:
            jax.debug.callback(lambda: steps.append(1))
        return decode_step(self, tokens_BT, cache)

    def steps_until(eos_ids):
        steps.clear()
        tokens = tokens_of(network, inputs, eos_ids=eos_ids)
        jax.effects_barrier()
        return len(steps), tokens

    monkeypatch.setattr(type(network), "decode_step", counted)
    num_steps, free = steps_until([])
    assert num_steps == N
    inputs[1] = inputs[0]  # so that both rows end together
    eos_id = int(free[0, 2])
    num_steps, tokens = steps_until([eos_id])
    assert num_steps == list(free[0]).index(eos_id) + 1 < N
    np.testing.assert_array_equal(tokens, cut(np.stack([free[0]] * 2), [eos_id]))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_give_what_one_call_gives(name):
    network, inputs, lengths = model(name), sequences(3, 5), [5, 1, 3]
    drawn = sampling(1.0, top_k=50)
    whole = tokens_of(network, inputs, lengths, sampling=drawn, seed=7)
    state = generate.prefill(network, inputs, lengths, N)
    for steps, expected in ((1, 1), (2, 3), (10, N)):
        state = generate.decode(network, state, steps, eos_ids=(), sampling=drawn, seed=7)
        assert state.counts_B.tolist() == [expected] * 3
    np.testing.assert_array_equal(state.tokens_BN, whole)


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_seed_row_and_step_alone(name):
    network, inputs, drawn = model(name), sequences(4, 5), sampling(1.5)
    tokens = tokens_of(network, inputs, sampling=drawn, seed=1)
    np.testing.assert_array_equal(tokens, tokens_of(network, inputs, sampling=drawn, seed=1))
    assert (tokens != tokens_of(network, inputs, sampling=drawn, seed=2)).any()
    # In another order, and with another row in the place of the first.
    inputs, rows = np.concatenate([sequences(1, 5, seed=5), inputs[[2, 1, 3]]]), [9, 2, 1, 3]
    state = generate.prefill(network, inputs, None, N, rows)
    state = generate.decode(network, state, N, eos_ids=(), sampling=drawn, seed=1)
    np.testing.assert_array_equal(state.tokens_BN[1:], tokens[[2, 1, 3]])
    # The same input twice is two draws.
    twice = tokens_of(network, inputs[[1, 1, 1, 1]], sampling=drawn, seed=1)
    assert len({tuple(row) for row in twice}) == 4


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}])
def test_prompts_admitted_into_finished_rows_give_what_each_gives_alone(changes):
    llama = model("llama_mini", **changes).unstacked()
    prompts, lengths = sequences(5, 8), [8, 3, 5, 1, 7]
    alone = tokens_of(llama, prompts, lengths)
    state = generate.empty(llama, 2, 16, N)
    found = {}
    in_place = {}
    for number, length in enumerate(lengths):
        place = int(np.argmax(np.asarray(state.finished_B)))
        # Rows have different limits, so that they do not end together.
        limit = N - number % 3
        state = generate.admit(llama, state, prompts[number : number + 1], length, place, limit, number)
        in_place[place] = number
        last = number == len(lengths) - 1
        state = generate.decode(llama, state, 100, eos_ids=(), min_running=1 if last else 2)
        for place in np.flatnonzero(np.asarray(state.finished_B)):
            if place in in_place:
                found[in_place.pop(place)] = state.tokens_BN[place].tolist()
    assert sorted(found) == list(range(5))
    for number, tokens in found.items():
        limit = N - number % 3
        assert tokens == [*alone[number, :limit], *[PAD_ID] * (N - limit)]


@pytest.mark.parametrize("name", NAMES)
def test_calls_with_equal_shapes_compile_once(name, monkeypatch):
    # A configuration that no other test has compiled.
    first, second = (model(name, seed, norm_epsilon=2e-6) for seed in (3, 5))
    traces = []
    decode_step = type(first).decode_step
    monkeypatch.setattr(type(first), "decode_step", lambda *args: traces.append(args) or decode_step(*args))
    tokens_of(first.unstacked(), sequences(2, 5), [5, 2], eos_ids=[1], sampling=sampling(1.0, top_p=0.9), seed=0)
    assert traces
    traces.clear()
    other = sampling(0.7, top_p=0.8)
    tokens_of(second.unstacked(), sequences(2, 5, seed=1), [1, 4], eos_ids=[2], sampling=other, seed=1)
    assert not traces


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.full), 1])
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_donated_and_written_in_place(name, kv_heads):
    network = model(name, decoder_self_kv_heads=kv_heads).unstacked()
    state = generate.prefill(network, sequences(2, 5), None, N)
    lowered = jax.jit(lambda model, state: generate.decode(model, state, N, eos_ids=()), donate_argnames="state").lower(
        network, state
    )
    copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", lowered.compile().as_text())
    cache = state.cache.self_attention[0].key.shape
    assert not {",".join(map(str, shape)) for shape in (cache, cache[1:])} & set(copied)
    generate.decode(network, state, N, eos_ids=())
    assert all(array.is_deleted() for array in jax.tree.leaves(state.cache))


def test_bad_input():
    with pytest.raises(InputError, match=r"^max_new_tokens=0 is below 1; expected 1 or more$"):
        generate.prefill(model("t5_1_1_mini"), sequences(1, 3), None, 0)
    llama = model("llama_mini", max_position=8)
    expected = "a prompt of 5 tokens and max_new_tokens=6 exceed the model's 8 positions; expected at most 2 tokens"
    with pytest.raises(InputError, match=f"^{expected}$"):
        generate.prefill(llama, sequences(2, 5), [5, 1], 6)
    with pytest.raises(InputError, match=r"8 positions; expected max_new_tokens below 8$"):
        generate.prefill(llama, sequences(1, 3), None, 9)


@pytest.mark.parametrize(
    ("name", "weights", "cache", "shape"),
    [("llama_mini", "int8", None, "96,64"), ("t5_1_1_mini", None, "int8", "8,4,512,16")],
)
def test_the_loop_carries_no_floats_of_what_is_quantised(name, weights, cache, shape, optimised):
    """XLA would make floats of what a loop does not change: of all kernels, or of the keys and values of the inputs."""
    make = lambda network: (network if weights is None else quantize(network, weights)).unstacked()  # noqa: E731
    network = jax.eval_shape(make, models.abstract(models.size(name)))
    inputs, rows = jax.ShapeDtypeStruct((8, 512), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    state = jax.eval_shape(generate.prefill_program, network, inputs, rows, rows, 4, 0, cache)
    arguments = network, state, np.int32(4), np.int32(1), generate.eos_array([]), None, jax.random.key(0)
    program = generate.decode_program.lower(*arguments).compile(optimised).as_text()
    [loop] = [line for line in program.splitlines() if " while(" in line]
    assert re.search(rf"s8\[(1,)?{shape}\]", loop)
    assert not re.search(rf"f32\[(1,)?{shape}\]", loop)
