"""Reward models on preferences: accuracy and calibration of literal margins, and a model's against direct calls."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import command_line, evaluate, models
from gqa.checkpoints import reward
from gqa.data.templates import Template
from gqa.data.vocabulary import Vocabulary
from gqa.decode.score import rewards
from gqa.errors import InputError
from gqa.evaluation import preferences
from gqa.models.reward import with_head

ROWS = [
    {"prompt": "def f(x)", "chosen": "return x", "rejected": "return y * z", "rating": "better"},
    {"prompt": "x", "chosen": "y", "rejected": "z and z", "rating": "slightly better"},
    {"prompt": "a", "chosen": "same", "rejected": "same "},
    {"prompt": "return", "chosen": "z", "rejected": "x + y"},
]


@pytest.fixture(scope="module")
def judge(tiny_vocabulary, tmp_path_factory):
    """A reward model of random weights and its folder."""
    model = with_head(models.create(models.size("llama_mini"), jax.random.key(0)), jax.random.key(1))
    folder = tmp_path_factory.mktemp("reward") / "model"
    reward.save(model, folder, extra_files=[tiny_vocabulary])
    return model, folder


@pytest.fixture
def file(tmp_path):
    """The preferences."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_summary_of_literal_margins():
    # σ(ln 3) = 0.75, σ(ln 9) = 0.9: in bins [0.75, 0.8) and [0.9, 0.95); of four 75 % sure ones three are right.
    three, nine = math.log(3.001), math.log(9.001)
    found = preferences.summary(np.array([three, three, three, -three, nine, nine, 0.0]), [3, 3, 2, 2, 0, 0, 0])
    assert found["pairs"] == 7 and found["accuracy"] == pytest.approx((3 + 2 + 0.5) / 7)
    assert found["by_rating"] == {
        "not rated": {"accuracy": pytest.approx(2.5 / 3), "pairs": 3},
        "slightly better": {"accuracy": 0.5, "pairs": 2},
        "better": {"accuracy": 1.0, "pairs": 2},
    }
    expected = [(0.5, 0.5, 1), (0.75, 0.75, 4), (0.9, 1.0, 2)]
    assert [tuple(bin.values()) for bin in found["calibration"]] == [pytest.approx(row, abs=1e-3) for row in expected]
    assert found["calibration_error"] == pytest.approx(2 * 0.1 / 7, abs=1e-3)
    loss = (3 * math.log(4 / 3) + math.log(4) + 2 * math.log(10 / 9) + math.log(2)) / 7
    assert found["loss"] == pytest.approx(loss, abs=1e-3)


def test_rewards_are_the_models_at_the_last_token(judge, file):
    model, folder = judge
    template = Template("openbezoar", Vocabulary(next(folder.glob("*.model")), foreign=True))
    pairs, skipped = preferences.read_pairs(file, template, 512)
    assert skipped == {"chosen equal to rejected": 1} and [pair.rating for pair in pairs] == [3, 2, 0]
    texts = [text for pair in pairs for text in pair[:2]]
    direct = [model({"decoder_inputs": jnp.array([text]), "targets_segments": None})[0, -1] for text in texts]
    np.testing.assert_allclose(rewards(model, texts, batch_size=4), direct, rtol=1e-4, atol=1e-5)


def test_command(judge, file, tmp_path, monkeypatch, capsys):
    _, folder = judge
    output = tmp_path / "scores"
    monkeypatch.setattr(
        sys,
        "argv",
        ["evaluate", f"--checkpoint={folder}", f"--preferences={file}", "--template=openbezoar", f"--output={output}"],
    )
    evaluate.main()
    printed = capsys.readouterr().out
    assert "| all |" in printed and "Left out: 1 of reason 'chosen equal to rejected'." in printed
    found = json.loads((output / "preferences.json").read_text())["checkpoints"]
    assert [one["pairs"] for one in found.values()] == [3]
    assert (output / "calibration.png").stat().st_size > 1000 and printed.strip() in (
        output / "preferences.md"
    ).read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"}', "pairs.jsonl line 1: there is no 'chosen' among prompt"),
        ('{"prompt": "x", "chosen": "a", "rejected": "b", "rating": "bettr"}', "nearest: 'better'"),
        ('{"prompt": "x", "chosen": "a", "rejected": "a"}', "no usable preferences (1 chosen equal to rejected)"),
        ("", "no usable preferences (it is empty)"),
    ],
)
def test_bad_files(judge, tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as caught:
        preferences.evaluate(judge[1], path, "openbezoar", 8)
    assert message in str(caught.value)


def test_no_reward_model(file, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "--checkpoint=assets/teacher_llama", f"--preferences={file}", "--template=openbezoar"]
    )
    with pytest.raises(SystemExit) as caught:
        command_line.run(evaluate.main)
    assert caught.value.code == 2 and "has no reward_head.safetensors" in capsys.readouterr().err
