"""Judges: the odds of Yes are those of the model's own log-probabilities, whatever the batch."""

import types

import jax
import numpy as np
import pytest

from gqa import checkpoints
from gqa.data.instructions.parts import Rejected
from gqa.data.templates import Template
from gqa.data.vocabulary import Vocabulary
from gqa.decode.buckets import padded
from gqa.posttraining import instructions, judge


@pytest.fixture(scope="module")
def model(folders):
    choices = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)
    return checkpoints.load(folders["policy"], **choices)


@pytest.fixture(scope="module")
def template(tiny_vocabulary):
    return Template("human_bot", Vocabulary(tiny_vocabulary, foreign=True))


def test_log_odds_are_the_models(model, template):
    questions = [[{"role": "user", "content": text}] for text in ("is x y", "is it a longer one", "z")]
    answers = [{"role": "assistant", "content": word} for word in ("Yes", "No")]
    examples = [template.example([*messages, answer]) for messages in questions for answer in answers]
    tokens_BT, _ = padded([example.tokens for example in examples], len(examples), 64)
    log_probs_BTV = jax.jit(lambda model, tokens_BT: jax.nn.log_softmax(model(tokens_BT)))(model, tokens_BT)
    sums = [
        sum(float(row_TV[place - 1, example.tokens[place]]) for place in np.flatnonzero(example.trained))
        for row_TV, example in zip(np.asarray(log_probs_BTV), examples, strict=True)
    ]
    expected = np.subtract(sums[::2], sums[1::2])
    for batch_size in (1, 4):
        found = judge.log_odds(model, template, questions, batch_size, "judge")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_question_beyond_the_positions_has_no_answer(model, template):
    questions = [[{"role": "user", "content": "x" * count}] for count in (model.config.max_position, 3)]
    long, short = judge.log_odds(model, template, questions, 2, "judge")
    assert long is None and isinstance(short, float)


def test_what_a_template_cannot_write_has_no_answer(model, template):
    """A model's own words may be so: nothing, or a special token spelled out."""
    said = [{"role": role, "content": content} for role, content in (("user", "x"), ("assistant", ""), ("user", "y"))]
    bad, good = judge.log_odds(model, template, [said, said[:1]], 2, "judge")
    assert bad is None and isinstance(good, float)
    config, opened = types.SimpleNamespace(inputs_length=8, batch_size=1), types.SimpleNamespace(template=template)
    assert instructions.Parent(config, opened, None, {}).write({3: said}) == {3: Rejected("empty response")}


def test_what_is_asked_shows_all_that_was_said():
    messages = [("system", "be brief"), ("user", "why?"), ("assistant", "so")]
    (asked,) = judge.question([{"role": role, "content": content} for role, content in messages])
    assert asked["role"] == "user"
    assert asked["content"].startswith("System message:\nbe brief\n\nInstruction:\nwhy?\n\nResponse:\nso\n\n")
    (asked,) = judge.question([{"role": role, "content": content} for role, content in messages[1:]])
    assert asked["content"].startswith("Instruction:\nwhy?")
