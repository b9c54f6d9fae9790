import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.checkpoints import hf
from gqa.decode import generate
from gqa.decode.generate import PAD_ID, greedy
from gqa.errors import InputError

MAX_TOKENS = 6


@functools.cache
def model(name, seed=3, **changes):
    return models.create(dataclasses.replace(models.size(name), **changes), jax.random.key(seed))


def sequences(batch, length, *, seed=0):
    return np.random.default_rng(seed).integers(2, 256, (batch, length), dtype=np.int32)


def argmax_t5(model, inputs, segments, tokens):
    """The most likely token after each prefix of `tokens`, by one forward: greedy tokens reproduce themselves."""
    shifted = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
    logits = jax.jit(lambda model: model(inputs, shifted, inputs_segments_BS=segments))(model)
    return np.asarray(jnp.argmax(logits, axis=-1))


def argmax_llama(model, prompts, tokens):
    """The same after prompts without padding on the left: rows are padded on the right, where nothing looks."""
    rows = [np.concatenate([prompt, row]) for prompt, row in zip(prompts, tokens, strict=True)]
    padded = np.stack([np.pad(row, (0, 20 - len(row))) for row in rows])
    argmax = np.asarray(jnp.argmax(jax.jit(lambda model: model(padded))(model), axis=-1))
    starts = [len(prompt) - 1 for prompt in prompts]
    return np.stack([row[start : start + MAX_TOKENS] for row, start in zip(argmax, starts, strict=True)])


def cut(tokens, eos_id):
    """`tokens` with everything after a row's first EOS replaced by padding."""
    after = np.cumsum(tokens == eos_id, axis=1) - (tokens == eos_id) > 0
    return np.where(after, PAD_ID, tokens)


@pytest.mark.parametrize("kv_heads", [4, 2, (4, 1)])
def test_t5_equals_the_full_forward(kv_heads):
    t5 = model("t5_1_1_mini", decoder_self_kv_heads=kv_heads, cross_kv_heads=kv_heads)
    inputs = sequences(3, 7)
    segments = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    tokens = np.asarray(greedy(t5.unstacked(), inputs, segments, MAX_TOKENS, None))
    np.testing.assert_array_equal(tokens, argmax_t5(t5, inputs, segments, tokens))
    assert len({tuple(row) for row in tokens}) == 3, "rows should differ for the test to mean something"


@pytest.mark.parametrize("changes", [{"decoder_self_kv_heads": K} for K in (4, 2, (1, 4))] + [{"sliding_window": 3}])
def test_llama_equals_the_full_forward_of_prompts_without_padding(changes):
    llama = model("llama_mini", **changes)
    lengths = [5, 2, 1]
    prompts = [row[:length] for row, length in zip(sequences(3, 5), lengths, strict=True)]
    # Padding is not 0: masked tokens must not matter.
    padded = np.stack([np.concatenate([np.full(5 - len(prompt), 99), prompt]) for prompt in prompts]).astype(np.int32)
    segments = jnp.asarray([[0] * (5 - length) + [1] * length for length in lengths])
    tokens = np.asarray(greedy(llama.unstacked(), padded, segments, MAX_TOKENS, None))
    np.testing.assert_array_equal(tokens, argmax_llama(llama, prompts, tokens))
    assert len({tuple(row) for row in tokens}) == 3, "rows should differ for the test to mean something"


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_stacked_and_unstacked_models_decode_alike(name):
    inputs = sequences(2, 1)
    stacked = greedy(model(name), inputs, None, MAX_TOKENS, None)
    np.testing.assert_array_equal(stacked, greedy(model(name).unstacked(), inputs, None, MAX_TOKENS, None))


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_rows_end_at_eos_and_are_padded(name):
    network, inputs = model(name), sequences(4, 5)
    free = np.asarray(greedy(network, inputs, None, MAX_TOKENS, None))
    for eos_id in {int(free[0, 1]), int(free[2, -1])}:
        tokens = np.asarray(greedy(network, inputs, None, MAX_TOKENS, eos_id))
        np.testing.assert_array_equal(tokens, cut(free, eos_id))
        assert (tokens == eos_id).any()


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_the_loop_takes_no_more_steps_than_needed(name, monkeypatch):
    network, inputs = model(name, norm_epsilon=3e-6), sequences(2, 1)  # a prompt of one token needs no prefill
    steps, decode_step = [], type(network).decode_step

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(*args)

    def steps_until(eos_id):
        steps.clear()
        tokens = np.asarray(greedy(network, inputs, None, MAX_TOKENS, eos_id))
        jax.effects_barrier()
        return len(steps), tokens

    monkeypatch.setattr(type(network), "decode_step", counted)
    num_steps, free = steps_until(None)
    assert num_steps == MAX_TOKENS
    inputs[1] = inputs[0]  # so that both rows end together
    eos_id = int(free[0, 2])
    num_steps, tokens = steps_until(eos_id)
    assert num_steps == list(free[0]).index(eos_id) + 1 < MAX_TOKENS
    np.testing.assert_array_equal(tokens, cut(np.stack([free[0]] * 2), eos_id))


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_calls_with_equal_shapes_compile_once(name, monkeypatch):
    # A configuration that no other test has compiled.
    first, second = (model(name, seed, norm_epsilon=2e-6) for seed in (3, 5))
    traces = []
    decode_step = type(first).decode_step
    monkeypatch.setattr(type(first), "decode_step", lambda *args: traces.append(args) or decode_step(*args))
    greedy(first.unstacked(), sequences(2, 5), None, MAX_TOKENS, 1)
    assert traces
    traces.clear()
    greedy(second.unstacked(), sequences(2, 5, seed=1), None, MAX_TOKENS, 1)
    assert not traces


def test_the_cache_is_donated():
    network = model("t5_1_1_mini")
    prefilled = generate.prefill(network, sequences(2, 5), None, MAX_TOKENS)
    generate.decode(network, prefilled, MAX_TOKENS, None)
    assert all(array.is_deleted() for array in jax.tree.leaves(prefilled.cache))


def test_bad_input():
    with pytest.raises(InputError, match=r"^max_tokens=0 must be at least 1$"):
        greedy(model("t5_1_1_mini"), sequences(1, 3), None, 0, None)
    with pytest.raises(InputError, match=r"^prompt 1 ends in padding; pad prompts on the left$"):
        greedy(model("llama_mini"), sequences(2, 3), jnp.asarray([[0, 1, 1], [1, 1, 0]]), 2, None)


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_equals_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kv_heads = {} if name == "t5_1_1_mini" else {"decoder_self_kv_heads": 2}
    network, inputs = model(name, **kv_heads), sequences(3, 6)
    hf.save(network, tmp_path / "hf", dtype="float32")
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5_1_1_mini" else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "hf").eval()
    padding = np.array([0, 2, 5])
    segments = (np.arange(6) >= padding[:, None]).astype(np.int32)
    if name == "t5_1_1_mini":
        segments = segments[:, ::-1]
    inputs = np.where(segments, inputs, PAD_ID)
    free = np.asarray(greedy(network, inputs, segments, 12, None))
    eos_id = int(free[0, 5])
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(inputs),
            attention_mask=torch.tensor(segments.copy()),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=PAD_ID,
        ).numpy()
    # T5 returns its start token in front, Llama the prompt.
    expected = expected[:, 1 if name == "t5_1_1_mini" else 6 :]
    expected = np.pad(expected, ((0, 0), (0, 12 - expected.shape[1])), constant_values=PAD_ID)
    np.testing.assert_array_equal(greedy(network.unstacked(), inputs, segments, 12, eos_id), expected)
