"""Orca: whose system message, what only the parent is told, and responses that explain nothing."""

import random

import pytest

from gqa.data.instructions.orca import Orca
from gqa.data.instructions.parts import NearCopies, Seed
from gqa.errors import InputError

SYSTEMS = {"cot": ("Go step by step.", "Give reasons."), "t0": ("",)}
ORCA = Orca(SYSTEMS, "t0", NearCopies(0.6, 9))
SEED = Seed(1, "Is 7 prime?", "Yes, it is.", "cot")


def candidate(seed=SEED):
    """What waits for a response."""
    (request,) = ORCA.requests([seed], random.Random(0))
    assert request.messages is None, "the parent writes no instruction"
    (found,) = ORCA.parse(request, "")
    return found


def test_the_right_answer_is_told_and_not_kept():
    found = candidate()
    system, asked = found.asked
    assert system["role"] == "system" and system["content"] in SYSTEMS["cot"]
    assert asked["content"].startswith("Is 7 prime?\n\nThe reference answer is: Yes, it is.\n\n")
    assert found.prompt == [system, {"role": "user", "content": "Is 7 prime?"}] and found.same is None
    plain = candidate(SEED._replace(submixture=None))
    assert plain.prompt == [{"role": "user", "content": "Is 7 prime?"}], "an empty system message is none"


def test_a_submixture_has_all_of_its_messages():
    requests = ORCA.requests([SEED] * 20, random.Random(0))
    assert {request.method for request in requests} == set(SYSTEMS["cot"])


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("Yes, it is.", "repeats the reference answer"),
        ("Yes, it is prime.", "repeats the reference answer"),
        ("As the Reference Answer says, 7 has no divisors but 1 and 7.", "names the reference answer"),
        ("Neither 2 nor 3 divides 7, and 5 is too large. So yes, it is.", None),
    ],
)
def test_responses(response, reason):
    assert ORCA.refusal(candidate(), response) == reason


def test_what_is_refused():
    for seed, message in (
        (SEED._replace(answer=None), "seed of line 1 has no answer"),
        (SEED._replace(submixture="cott"), "seed of line 1: submixture 'cott'; expected one of cot, t0; nearest: cot"),
    ):
        with pytest.raises(InputError, match=message):
            ORCA.requests([seed], random.Random(0))
    with pytest.raises(InputError, match=r"orca.default='t'; expected one of cot, t0; nearest: t0"):
        Orca(SYSTEMS, "t", ORCA.near_copies)
    with pytest.raises(InputError, match=r"orca.systems.cot=\(\); expected one or more texts"):
        Orca({"cot": ()}, "cot", ORCA.near_copies)
