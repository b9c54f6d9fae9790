import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from gqa import models
from gqa.decode import batches, generate
from gqa.decode.batches import Draft, Settings, generate_all, stream
from gqa.decode.buckets import bucket, padded
from gqa.decode.sampling import sampling
from gqa.errors import InputError
from gqa.models.quantize import quantize
from gqa.nn.quantized import QuantizedKernel

GREEDY = Settings(
    max_new_tokens=6, eos_ids=(7, 50), sampling=None, seed=0, num_beams=1, length_penalty=1.0, batch_size=3
)
PROMPTS = {
    number: np.random.default_rng(number).integers(2, 256, length).tolist()
    for number, length in enumerate([5, 20, 1, 9, 14, 3, 17, 2])
}


@functools.cache
def model(name, **changes):
    return models.create(dataclasses.replace(models.size(name), **changes), jax.random.key(3)).unstacked()


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("t5_1_1_mini", "greedy"),
        ("t5_1_1_mini", "beams"),
        pytest.param("t5_1_1_mini", "sampled", marks=pytest.mark.full),
        ("llama_mini", "greedy"),
        ("llama_mini", "sampled"),
        pytest.param("llama_mini", "beams", marks=pytest.mark.full),
    ],
)
def test_mixed_prompts_give_what_each_gives_alone(name, choice):
    changes = {"greedy": {}, "sampled": {"sampling": sampling(1.2, top_k=100)}, "beams": {"num_beams": 2}}
    settings = dataclasses.replace(GREEDY, **changes[choice])
    found = dict(generate_all(model(name), PROMPTS, settings))
    assert found.keys() == PROMPTS.keys()
    # Alone, and in another place of the batch.
    for number in PROMPTS if choice == "greedy" else (3, 6):
        alone = dict(generate_all(model(name), {number: PROMPTS[number]}, settings))
        assert alone == {number: found[number]}
    ended = [tokens for tokens in found.values() if len(tokens) < 6]
    assert all(tokens[-1] in settings.eos_ids for tokens in ended)
    assert len({tuple(tokens) for tokens in found.values()}) > 4


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_a_stream_is_the_same_tokens(name):
    expected = dict(generate_all(model(name), {0: PROMPTS[1]}, GREEDY))[0]
    chunks = list(stream(model(name), PROMPTS[1], GREEDY, chunk=2))
    assert [token for chunk in chunks for token in chunk] == expected
    assert [len(chunk) for chunk in chunks] == [1, 2, 2, 1][: len(chunks)]


def test_many_lengths_compile_a_program_for_each_bucket():
    llama = model("llama_mini", norm_epsilon=4e-6)  # a configuration that no other test has compiled
    before = generate.admit._cache_size(), generate.decode_program._cache_size()
    lengths = [*range(1, 25, 3), *range(1, 25, 5)]
    prompts = {number: [3] * length for number, length in enumerate(lengths)}
    dict(generate_all(llama, prompts, dataclasses.replace(GREEDY, max_new_tokens=3)))
    after = generate.admit._cache_size(), generate.decode_program._cache_size()
    assert (after[0] - before[0], after[1] - before[1]) == (len({bucket(length) for length in lengths}), 1) == (2, 1)


def test_buckets():
    assert [bucket(length) for length in (1, 16, 17, 25, 33, 49, 65, 100, 2048, 2049)] == [
        16, 16, 24, 32, 48, 64, 96, 128, 2048, 3072
    ]  # fmt: skip
    tokens, lengths = padded([[5, 6], [7]], 3, 4)
    assert tokens.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
    assert lengths.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 2, "sampling": sampling(1.0)}, r"beams=2 with sampling; expected beams=1 or no temperature"),
        ({"num_beams": 0}, r"num_beams=0 is below 1"),
        ({"length_penalty": float("nan")}, r"length_penalty=nan is not finite"),
        ({"batch_size": 0}, r"batch_size=0 is below 1"),
        ({"seed": 2**32}, r"seed=4294967296; expected 0\.\.4294967295; nearest: 4294967295"),
        ({"seed": -1}, r"seed=-1; expected 0\.\.4294967295; nearest: 0"),
    ],
)
def test_settings_that_contradict_themselves(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GREEDY, **changes)


def test_prompts_that_are_refused():
    llama = model("llama_mini")
    for prompt, message in (
        ([], "the prompt is empty; expected some text"),
        ([300], "token 300 is none of the model's; expected ids below 256"),
        ([4, -1], "token -1 is none of the model's; expected ids of 0 or more"),
        ([3] * 4095, "a prompt of 4095 tokens and max_new_tokens=6 exceed the model's 4096 positions; .* at most 4090"),
    ):
        with pytest.raises(InputError, match=message):
            dict(generate_all(llama, {0: [3], 1: prompt}, GREEDY))
    with pytest.raises(InputError, match="max_new_tokens=10000000000000000000 is no int32"):
        batches.check_prompt(models.size("t5_1_1_mini"), [3], 10**19)
    draft = Draft(model("llama_mini", max_position=16), 3)
    with pytest.raises(InputError, match=r"the draft: a prompt of 11 tokens .* exceed the model's 16 positions"):
        next(generate_all(llama, {0: [3], 1: [3] * 11}, dataclasses.replace(GREEDY, batch_size=1), draft))


def test_a_batch_that_cannot_fit_says_the_largest_that_does():
    llama = model("llama_mini")
    settings = dataclasses.replace(GREEDY, batch_size=10**9)
    with pytest.raises(InputError, match=r"batch_size=1000000000 needs .* largest that fits: (\d+)$") as error:
        batches.check_memory(llama, settings, 20)
    largest = int(str(error.value).split()[-1])
    batches.check_memory(llama, dataclasses.replace(settings, batch_size=largest), 20)
    with pytest.raises(InputError, match=f"largest that fits: {largest}$"):
        batches.check_memory(llama, dataclasses.replace(settings, batch_size=largest + 1), 20)


@pytest.mark.parametrize("name", [pytest.param("t5_1_1_mini", marks=pytest.mark.full), "llama_mini"])
def test_an_int8_cache_moves_the_logits_by_little(name):
    network = model(name)
    inputs, lengths = padded(list(PROMPTS.values()), 8, 24)
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    logits = []
    for dtype in (None, "int8"):
        state = generate.prefill(network, inputs, lengths, 6, cache_dtype=dtype)
        # The same four tokens after each prompt.
        for tokens in np.full((4, 8, 1), [[9]], np.int32):
            found, cache = step(network, tokens, state.cache)
            state = state._replace(cache=cache)
        logits.append(np.asarray(found))
    error = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0])
    assert 0 < error < 0.01
    settings = dataclasses.replace(GREEDY, cache_dtype="int8")
    found = dict(generate_all(network, PROMPTS, settings))
    assert dict(generate_all(network, {3: PROMPTS[3]}, settings)) == {3: found[3]}


@pytest.mark.parametrize(
    ("name", "weights", "choice"),
    [
        pytest.param("t5_1_1_mini", "int4", "beams", marks=pytest.mark.full),
        ("llama_mini", "int8", "continuous"),
        ("llama_mini", "int4", "draft"),
    ],
)
def test_quantised_kernels_give_the_tokens_of_their_values(name, weights, choice):
    quantized = quantize(model(name), weights)
    is_kernel = lambda node: isinstance(node, QuantizedKernel)  # noqa: E731
    values = jax.tree.map(
        lambda node: nnx.Param(node.kernel("float32")) if is_kernel(node) else node, quantized, is_leaf=is_kernel
    )
    settings = dataclasses.replace(GREEDY, num_beams=2 if choice == "beams" else 1)
    draft = Draft(values, 3) if choice == "draft" else None
    found = dict(generate_all(quantized, PROMPTS, settings, draft))
    assert found == dict(generate_all(values, PROMPTS, settings))
    if draft is not None:
        # It proposes what the model says, but for what comes after an end.
        assert draft.num_accepted > 0.5 * draft.num_proposed > 0


@pytest.mark.parametrize("name", [pytest.param("t5_1_1_mini", marks=pytest.mark.full), "llama_mini"])
def test_a_draft_changes_no_output(name):
    draft = Draft(quantize(model(name), "int4"), 3)
    settings = dataclasses.replace(GREEDY, cache_dtype="int8")
    assert dict(generate_all(model(name), PROMPTS, settings, draft)) == dict(
        generate_all(model(name), PROMPTS, settings)
    )
    assert 0 < draft.num_accepted <= draft.num_proposed
    with pytest.raises(InputError, match="beams=2 with a draft; expected beams=1 or no draft"):
        dict(generate_all(model(name), PROMPTS, dataclasses.replace(GREEDY, num_beams=2), draft))


def test_drawn_tokens_of_a_draft_depend_on_the_seed_and_the_prompts_number():
    settings = dataclasses.replace(GREEDY, sampling=sampling(1.2))
    draft = Draft(model("llama_mini"), 3)
    found = dict(generate_all(model("llama_mini"), PROMPTS, settings, draft))
    assert dict(generate_all(model("llama_mini"), {6: PROMPTS[6]}, settings, draft)) == {6: found[6]}
