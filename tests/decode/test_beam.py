import itertools

import jax
import numpy as np
import pytest

from gqa import models
from gqa.decode.beam import beam_search
from gqa.decode.generate import generate
from gqa.decode.score import score
from gqa.errors import InputError

INPUTS = np.random.default_rng(0).integers(2, 256, (3, 5), dtype=np.int32)
LENGTHS = [5, 2, 3]


def model(name, **changes):
    return models.create(models.replace(models.size(name), **changes), jax.random.key(3)).unstacked()


@pytest.mark.parametrize("name", [pytest.param("t5_1_1_mini", marks=pytest.mark.full), "llama_mini"])
def test_beams_wide_enough_find_the_best_of_all_sequences(name):
    # Four tokens and three steps: with 16 beams every prefix is kept.
    network = model(name, vocab_size=4)
    prompts = [[1, 2, 3], [2], [3, 1]]
    inputs = np.array([[1, 2, 3], [2, 0, 0], [3, 1, 0]])
    found = beam_search(network, inputs, [3, 1, 2], max_new_tokens=3, eos_ids=[], num_beams=16, length_penalty=1.0)
    sequences = list(itertools.product(range(4), repeat=3))
    for row, prompt in enumerate(prompts):
        totals = np.array([scores.sum() for scores in score(network, [prompt] * 64, sequences)])
        best = np.argsort(-totals)[:5]
        assert found.tokens_BWN[row, :5].tolist() == [list(sequences[i]) for i in best]
        np.testing.assert_allclose(found.scores_BW[row, :5], totals[best] / 3, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_one_beam_is_greedy(name):
    network = model(name)
    state = generate(network, INPUTS, LENGTHS, max_new_tokens=6, eos_ids=[])
    found = beam_search(network, INPUTS, LENGTHS, max_new_tokens=6, eos_ids=[], num_beams=1, length_penalty=1.0)
    np.testing.assert_array_equal(found.tokens_BWN[:, 0], state.tokens_BN)


def test_bad_input():
    for settings, message in (
        (dict(num_beams=0, length_penalty=1.0), "num_beams=0 is below 1; expected 1 or more"),
        (dict(num_beams=2, length_penalty=float("inf")), "length_penalty=inf is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            beam_search(model("llama_mini"), INPUTS, None, max_new_tokens=2, eos_ids=[], **settings)
