from pathlib import Path

import pytest

from gqa.errors import InputError
from gqa.evaluation.table import average, headlines, labels, mean_and_spread, table

# GQA, Table 1.
COLUMNS = "CNN R1 | arXiv R1 | PubMed R1 | MediaSum R1 | Multi-News R1 | WMT BLEU | TriviaQA F1"
SCORES = {
    "MHA-XXL": [43.8, 45.6, 47.5, 36.4, 46.9, 28.4, 81.9],
    "MQA-XXL": [43.0, 45.0, 46.9, 36.1, 46.5, 28.5, 81.3],
    "GQA-8-XXL": [43.5, 45.4, 47.7, 36.3, 47.2, 28.4, 81.6],
}
TASKS = ["cnn_dailymail", "arxiv", "pubmed", "media_sum", "multi_news", "wmt14_en_de", "trivia_qa"]
METRICS = {task: ["rouge"] for task in TASKS} | {"wmt14_en_de": ["bleu"], "trivia_qa": ["trivia_qa"]}


def test_the_papers_table():
    rows = {name: dict(zip(TASKS, values, strict=True)) for name, values in SCORES.items()}
    assert table(rows, METRICS, averaged=False).splitlines() == [
        f"| model | avg | {COLUMNS} |",
        "|---|---|---|---|---|---|---|---|---|",
        "| MHA-XXL | 47.2 | 43.8 | 45.6 | 47.5 | 36.4 | 46.9 | 28.4 | 81.9 |",
        "| MQA-XXL | 46.8 | 43.0 | 45.0 | 46.9 | 36.1 | 46.5 | 28.5 | 81.3 |",
        "| GQA-8-XXL | 47.2 | 43.5 | 45.4 | 47.7 | 36.3 | 47.2 | 28.4 | 81.6 |",
    ]
    assert average(rows["MQA-XXL"]) == pytest.approx(327.3 / 7)


def test_headlines_stand_in_the_papers_order():
    intervals = {
        name: {"value": value} for name, value in (("rouge1", 1.0), ("rouge2", 2.0), ("f1", 3.0), ("bleu", 4.0))
    }
    scores = {"mine": intervals, "trivia_qa": intervals, "arxiv": intervals}
    metrics = {"mine": ["bleu", "rouge"], "trivia_qa": ["trivia_qa"], "arxiv": ["rouge"]}
    found = headlines(scores, metrics)
    assert list(found.items()) == [("arxiv", 1.0), ("trivia_qa", 3.0), ("mine", 4.0)]
    assert table({"x": found}, metrics, averaged=True).splitlines()[0] == (
        "| model | avg | arXiv R1 | TriviaQA F1 | mine bleu |"
    )


def test_seeds_are_averaged_with_their_spread():
    rows = {"seed_0": {"arxiv": 1.0, "pubmed": 4.0}, "seed_1": {"arxiv": 3.0, "pubmed": 4.0}}
    assert mean_and_spread(list(rows.values())) == {
        "arxiv": {"mean": 2.0, "spread": pytest.approx(2**0.5)},
        "pubmed": {"mean": 4.0, "spread": 0.0},
    }
    last = table(rows, METRICS, averaged=True).splitlines()[-1]
    assert last == "| mean of 2 | 3.0 ± 0.7 | 2.0 ± 1.4 | 4.0 ± 0.0 |"


def test_labels():
    assert labels([Path("runs/a/model")]) == ["model"]
    assert labels([Path("runs/a/model/..")]) == ["a"] and labels([Path("/")]) == ["root"]
    assert labels([Path("runs/a/model"), Path("runs/b/model")]) == ["a_model", "b_model"]
    with pytest.raises(InputError, match=r"^checkpoint runs/a is named twice; expected different ones$"):
        labels([Path("runs/a"), Path("runs/b"), Path("runs/a")])
