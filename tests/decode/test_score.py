import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.decode.score import score
from gqa.errors import InputError

INPUTS = [[5, 6, 7, 8], [9]]
CONTINUATIONS = [[3, 4], [20, 21, 22, 23]]


@pytest.mark.parametrize("name", ["t5_1_1_mini", "llama_mini"])
def test_scores_are_those_of_each_row_without_padding(name):
    model = models.create(models.size(name), jax.random.key(0))
    found = score(model, INPUTS, CONTINUATIONS)
    for scores, prompt, continuation in zip(found, INPUTS, CONTINUATIONS, strict=True):
        if name == "t5_1_1_mini":
            logits = model(jnp.array([prompt]), jnp.array([[0, *continuation[:-1]]]))[0]
        else:
            logits = model(jnp.array([[*prompt, *continuation]]))[0, len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[np.arange(len(continuation)), np.array(continuation)]
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_row_may_fill_every_position():
    llama = models.create(models.replace(models.size("llama_mini"), max_position=4, num_layers=1), jax.random.key(0))
    [found] = score(llama, [[5, 6, 7, 8]], [[3]])
    expected = jax.nn.log_softmax(llama(jnp.array([[5, 6, 7, 8]]))[0, -1])[3]
    np.testing.assert_allclose(found, [expected], rtol=1e-5, atol=1e-5)
    message = r"prompt 0 and its continuation have 4 \+ 2 tokens; expected at most one more than the model's 4 pos"
    with pytest.raises(InputError, match=message):
        score(llama, [[5, 6, 7, 8]], [[3, 4]])


def test_bad_input():
    llama = models.create(models.size("llama_mini"), jax.random.key(0))
    assert score(llama, [], []) == []
    with pytest.raises(InputError, match="2 inputs and 1 continuations; expected as many of each"):
        score(llama, [[1], [2]], [[3]])
    with pytest.raises(InputError, match="prompt 1 is empty; expected at least one token, such as BOS"):
        score(llama, [[1], []], [[3], [3]])
