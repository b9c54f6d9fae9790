"""Evol-Instruct: what the parent is asked, literal answers of a parent, and evolutions that failed."""

import random

import pytest

from gqa.data.instructions.evol import BREADTH, METHODS, Evol
from gqa.data.instructions.parts import NearCopies, Rejected, Seed
from gqa.errors import InputError

SEED = Seed(3, "Name a bird.", "The wren.", None)
EVOL = Evol(methods=1, near_copies=NearCopies(0.6, 9))


def parse(text, seed=SEED):
    """What becomes of the parent's answer."""
    (request,) = EVOL.requests([seed], random.Random(0))
    (found,) = EVOL.parse(request, text)
    return found


def test_every_method_asks_for_its_own():
    requests = Evol(len(METHODS), EVOL.near_copies).requests([SEED], random.Random(0))
    texts = {request.method: request.messages[0]["content"] for request in requests}
    assert set(texts) == set(METHODS) and len(set(texts.values())) == len(METHODS)
    assert all("<given>\nName a bird.\n</given>" in text for text in texts.values())
    assert "another prompt" in texts[BREADTH] and all("Rewrite it" in texts[name] for name in texts.keys() - {BREADTH})
    several = EVOL.requests([SEED] * 50, random.Random(0))
    assert {request.method for request in several} == set(METHODS) and len(several) == 50
    with pytest.raises(InputError, match=r"evol.methods=6; expected 1 to 5: constraints"):
        Evol(6, EVOL.near_copies)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name a bird that cannot fly.", "no <prompt>"),
        ("<prompt>Name a bird that", "unclosed <prompt>"),
        ("<prompt></prompt>", "empty <prompt>"),
        ("<prompt>Name a fish.</prompt> or <prompt>Name a tree.</prompt>", "several <prompt>"),
        ("<prompt>name  a BIRD.</prompt>", "equal to its seed"),
        ("<prompt>Rewritten prompt: name a bird that cannot fly.</prompt>", "names its request"),
        ("<prompt>In the given prompt, name a rarer bird.</prompt>", "names its request"),
    ],
)
def test_evolutions_that_failed(text, reason):
    assert parse(text) == Rejected(reason)


def test_an_evolved_prompt():
    found = parse("Here it is: <prompt>Name a bird that cannot fly, and say why.</prompt>")
    assert found.instruction == "Name a bird that cannot fly, and say why."
    assert found.asked == found.prompt == [{"role": "user", "content": found.instruction}]
    (question,) = found.same
    assert SEED.text in question["content"] and found.instruction in question["content"]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("Sorry, I cannot do that.", "declined"),
        ("I am sorry. " + "word " * 78, None),  # 81 words: it says more than that
        ("I am sorry. " + "word " * 76, "declined"),  # 79
        ("... !?", "says nothing"),
        ("It is what it was, and so on.", "says nothing"),
        ("The kiwi: its wings are too small.", None),
    ],
)
def test_responses(response, reason):
    assert EVOL.refusal(parse("<prompt>Name a bird that cannot fly.</prompt>"), response) == reason
