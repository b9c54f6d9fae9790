"""LaMini: what the parent is asked, and literal answers of a parent."""

import random

import pytest

from gqa.data.instructions.lamini import Lamini
from gqa.data.instructions.parts import NearCopies, Rejected, Request, Seed
from gqa.errors import InputError

SEEDS = [Seed(number, f"Seed {number}", None, None) for number in range(1, 6)]


def lamini(**changes):
    return Lamini(**{"calls": 4, "shown": 2, "asked": 3, "topics": None, "topics_shown": 1} | changes, near_copies=NEAR)


NEAR = NearCopies(0.6, 9)


def test_calls_show_examples_and_topics(tmp_path):
    requests = lamini().requests(SEEDS, random.Random(0))
    assert len(requests) == 4 and len({request.seeds for request in requests}) > 1
    for request in requests:
        (message,) = request.messages
        shown = [seed for seed in SEEDS if f"<example>{seed.text}</example>" in message["content"]]
        assert sorted(request.seeds) == shown and len(shown) == 2
        assert "Write 3 new instructions" in message["content"] and "topics" not in message["content"]
    assert lamini().requests(SEEDS, random.Random(0)) == requests != lamini().requests(SEEDS, random.Random(1))
    topics = tmp_path / "topics.txt"
    topics.write_text("birds\n\nthe sea\n")
    guided = lamini(topics=str(topics), topics_shown=2).requests(SEEDS, random.Random(0))
    for request in guided:
        text = request.messages[0]["content"]
        assert request.method == "topics" and ("topics: birds, the sea." in text or "topics: the sea, birds." in text)


def test_literal_answers():
    text = (
        "Sure!\n<example>Name a bird.</example>\n2. <example>\nSort these:\n3 1 2\n</example>\n<example></example>"
        "<example>Sing.</example><example>Once more.</example><example>Cut o"
    )
    found = lamini().parse(Request((), "examples", []), text)
    assert [each if isinstance(each, Rejected) else each.instruction for each in found] == [
        "Name a bird.",
        "Sort these:\n3 1 2",
        Rejected("empty <example>"),
        "Sing.",
        Rejected("more than asked for"),
        Rejected("unclosed <example>"),
    ]
    assert found[0].asked == found[0].prompt == [{"role": "user", "content": "Name a bird."}] and found[0].same is None
    assert lamini().parse(Request((), "examples", []), "1. Name a bird.") == [Rejected("no <example>")]


def test_what_is_refused(tmp_path):
    topics = tmp_path / "topics.txt"
    topics.write_text("birds\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for changes, message in (
        ({"shown": 6}, "lamini.shown=6 of 5 that there are; expected at most 5"),
        ({"calls": 0}, "lamini.calls=0; expected at least 1"),
        ({"topics": str(topics), "topics_shown": 2}, "lamini.topics_shown=2 of 1 that there are"),
        ({"topics": "nowhere.txt"}, "lamini.topics=nowhere.txt is not a file"),
        ({"topics": str(tmp_path / "empty.txt")}, "is empty; expected text, a topic a line"),
        ({"topics": str(tmp_path / "latin.txt")}, "byte 4 is no UTF-8"),
    ):
        with pytest.raises(InputError, match=message):
            lamini(**changes).requests(SEEDS, random.Random(0))
