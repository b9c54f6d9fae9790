"""Responses of fixed shapes: their log-probabilities, many samples of a prompt, scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.models.reward import with_head
from gqa.posttraining import rollouts

S, N = 8, 6
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [11]]
DRAW = dict(eos_ids=tuple(range(40)), temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def policy(tiny_run):
    return models.create(tiny_run("llama", {"model.scan_layers": False}).model.architecture(), jax.random.key(7))


@pytest.fixture(scope="module")
def drawn(policy):
    """Four samples of three prompts, with room for a fourth."""
    return rollouts.draw(rollouts.unstacked(policy), PROMPTS, 100 + np.arange(16), shape=(4, S, N), **DRAW)


def test_rows_are_prompts_and_their_responses(drawn):
    tokens, counts, response = map(np.asarray, (drawn.tokens_BT, drawn.counts_B, drawn.response_BN))
    for row, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(4)):
        expected = [*prompt, *response[row, : counts[row]]]
        assert tokens[row].tolist() == [*expected, *[0] * (S + N - len(expected))]
        ended = bool(drawn.ended_B[row])
        assert ended == (response[row, counts[row] - 1] < 40) and (ended or counts[row] == N)
    assert counts[12:].tolist() == [0] * 4 and not drawn.ended_B[12:].any()
    assert 0 < drawn.ended_B.sum() < 12
    assert len({tuple(row) for row in response[:4]}) > 1, "the samples of a prompt are several draws"
    np.testing.assert_array_equal(drawn.weights_BN.sum(axis=1), counts)


@pytest.mark.parametrize("ending", [[7], [7, 9], [7, 9, 8]])
def test_all_get_the_end_that_templates_write(drawn, ending):
    """What was cut all of it, what has its own EOS what follows, a row that is not there nothing."""
    tokens, lengths = map(np.asarray, rollouts.ended(drawn, np.array(ending)))
    plain, counts = np.asarray(drawn.tokens_BT), np.asarray(drawn.prompt_lengths_B + drawn.counts_B)
    for row in range(16):
        end = [] if row >= 12 else ending[1:] if drawn.ended_B[row] else ending
        assert lengths[row] == counts[row] + len(end)
        assert tokens[row].tolist() == [*plain[row, : counts[row]], *end, *[0] * (S + N + len(ending) - lengths[row])]


def test_samples_are_what_their_numbers_draw_alone(policy, drawn):
    alone = rollouts.draw(rollouts.unstacked(policy), [PROMPTS[1]], np.array([106]), shape=(1, S, N), **DRAW)
    np.testing.assert_array_equal(alone.response_BN[0], drawn.response_BN[6])


def test_sampler_and_trainer_agree(policy, drawn):
    """The log-probabilities that the engine kept are those of one whole forward of each row without padding."""
    ours = jax.jit(lambda *a: rollouts.response_log_probs(*a, DRAW["temperature"]))(policy, drawn)
    off = np.abs(np.asarray(ours) - np.asarray(drawn.sampled_BN)) * np.asarray(drawn.weights_BN)
    assert 0 < off.max() < 1e-5
    whole = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens) / DRAW["temperature"]))
    log_probs = np.asarray(whole(policy, drawn.tokens_BT))
    for row in range(12):
        first, count = int(drawn.prompt_lengths_B[row]), int(drawn.counts_B[row])
        tokens = np.asarray(drawn.response_BN[row, :count])
        expected = log_probs[row, np.arange(first - 1, first - 1 + count), tokens]
        np.testing.assert_allclose(drawn.sampled_BN[row, :count], expected, atol=1e-5)


def test_scores_and_values_by_position(policy, drawn):
    reward = with_head(policy, jax.random.key(1))
    every = np.asarray(reward({"decoder_inputs": drawn.tokens_BT, "targets_segments": None}))
    lengths = drawn.prompt_lengths_B + drawn.counts_B
    tags = jnp.arange(16) % 2 == 0
    arguments = (drawn.tokens_BT, lengths, tags)
    found = np.asarray(rollouts.score(reward, None, *arguments, gate=0.15, size=4))
    ends = every[np.arange(12), np.asarray(lengths)[:12] - 1]
    np.testing.assert_allclose(found[:12], ends, atol=1e-5)
    values = rollouts.response_values(reward, drawn)
    starts = np.asarray(drawn.prompt_lengths_B) - 1
    np.testing.assert_allclose(values[:12, 1], every[np.arange(12), starts[:12] + 1], atol=1e-5)
    # With a second model that finds everything unsafe, its score is the one that counts.
    unsafe = with_head(policy, jax.random.key(1))
    unsafe.head[...] = unsafe.head[...] * 0.0
    both = rollouts.score(reward, unsafe, *arguments, gate=0.15, size=4)
    np.testing.assert_allclose(both, np.where(tags, 0.0, found), atol=1e-6)
    np.testing.assert_allclose(rollouts.score(reward, unsafe, *arguments, gate=0.6, size=4), 0.0, atol=1e-6)
