"""Ghost attention's dialogues: what is asked while sampling, and what is trained."""

import random

import pytest

from gqa.data.gatt import ghost_dialogue, random_instruction
from gqa.errors import InputError


def test_the_instruction_is_in_every_turn_while_sampling_and_in_the_first_only_after():
    asked = []

    def respond(messages):
        asked.append([message["content"] for message in messages])
        return f"answer {len(messages)}"

    messages = ghost_dialogue(["hi", "who?", "bye"], "Act as Napoleon.", respond, kept="Figure: Napoleon.")
    assert asked == [
        ["Act as Napoleon.\n\nhi"],
        ["Act as Napoleon.\n\nhi", "answer 1", "Act as Napoleon.\n\nwho?"],
        ["Act as Napoleon.\n\nhi", "answer 1", "Act as Napoleon.\n\nwho?", "answer 3", "Act as Napoleon.\n\nbye"],
    ]
    assert messages == [
        {"role": "user", "content": "Figure: Napoleon.\n\nhi"},
        {"role": "assistant", "content": "answer 1", "train": False},
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "answer 3", "train": False},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "answer 5"},
    ]


def test_random_instructions_combine_kinds_and_are_short_half_of_the_time():
    constraints = {"figure": ["Napoleon"], "language": ["French"]}
    forms = {"figure": "Always act as {} from now on.", "language": "Speak in {}."}
    drawn = [random_instruction(constraints, forms, random.Random(seed)) for seed in range(400)]
    assert {long for long, _ in drawn} == {
        "Always act as Napoleon from now on.",
        "Speak in French.",
        "Always act as Napoleon from now on. Speak in French.",
        "Speak in French. Always act as Napoleon from now on.",
    }
    assert {short for long, short in drawn if short != long} == {
        "Figure: Napoleon.",
        "Language: French.",
        "Figure: Napoleon. Language: French.",
        "Language: French. Figure: Napoleon.",
    }
    assert 150 < sum(long != short for long, short in drawn) < 250


def test_nothing_to_say():
    with pytest.raises(InputError, match="one of them is empty"):
        ghost_dialogue([], "Act.", str)
    with pytest.raises(InputError, match="expected the same kinds"):
        random_instruction({"hobby": ["tennis"]}, {}, random.Random(0))
