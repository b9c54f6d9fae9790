"""The task of recall: what is asked is answered by the facts, and a word is a token."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import recall
from gqa.data import loader
from gqa.data.prepare import read_manifest
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError

ASSETS = Path(__file__).parents[2] / "assets"


def triples(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + 3]) for i in range(0, len(words), 3)]


def test_facts_answer_the_questions():
    drawn = list(recall.rows(np.random.default_rng(1), 50))
    assert len({row["inputs"] for row in drawn}) == 50
    for row in drawn:
        facts, questions = row["inputs"].split(" which")
        answers = triples(row["targets"])
        known = {(key, relation): value for key, relation, value in triples(facts)}
        assert len(known) == recall.FACTS == len(triples(facts))
        assert questions.split() == list(itertools.chain(*(answer[:2] for answer in answers)))
        assert len(answers) == recall.QUESTIONS and all(known[answer[:2]] == answer[2] for answer in answers)


def test_every_word_is_a_token():
    vocabulary = Vocabulary(ASSETS / "vocabulary" / "python_4096.model")
    for word in {*recall.KEYS, *recall.RELATIONS, *recall.VALUES, "which"}:
        assert len(vocabulary.encode(f" {word}")) == 1, word


def test_writes_what_training_reads(tmp_path, capsys):
    recall.write(tmp_path / "recall", {"train": 40, "heldout": 10})
    manifest = read_manifest(tmp_path / "recall" / "records")
    assert manifest.num_records == {"train": 40, "heldout": 10} and not any(manifest.num_trimmed["train"].values())
    batch = loader.train_batches(tmp_path / "recall" / "records", 8, seed=0)(0)
    assert batch["inputs"].shape == (8, 66) and batch["targets"].shape == (8, 25)
    assert batch["inputs_segments"].all() and batch["loss_weights"].all()  # every row is full
    assert "40 rows of train, 10 rows of heldout" in capsys.readouterr().out


def test_interrupted_it_goes_on_and_what_is_there_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall, "ROWS", {"train": 40, "heldout": 10})
    monkeypatch.setattr(sys, "argv", ["recall", f"--output={tmp_path}"])
    rows = recall.rows

    def interrupted(rng, count):
        yield from rows(rng, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(recall, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recall.main()
    assert not (tmp_path / "rows").exists()
    monkeypatch.setattr(recall, "rows", rows)
    recall.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records", "rows"]
    with pytest.raises(InputError, match="records exists; choose a new folder"):
        recall.main()
