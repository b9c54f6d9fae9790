"""The order of things, with a parent whose answers are literals: what passes, and what each step drops."""

import random

from gqa.data.instructions.evol import Evol
from gqa.data.instructions.lamini import Lamini
from gqa.data.instructions.orca import Orca
from gqa.data.instructions.parts import NearCopies, Rejected, Seed
from gqa.data.instructions.pipeline import Written, generate

NEAR = NearCopies(0.6, 9)


def run(program, seeds, answers, same=lambda questions: [False] * len(questions)):
    """The outcome, and what the parent was asked by number; `answers`: text asked for, or a part -> what is written."""
    asked = {}

    def write(messages):
        asked.update(messages)
        return {number: answer(each[-1]["content"]) for number, each in messages.items()}

    def answer(text):
        return next(
            found if isinstance(found, Written | Rejected) else Written(found, True)
            for part, found in answers.items()
            if part in text
        )

    return generate(program, program.requests(seeds, random.Random(0)), seeds, write, same), asked


def conversations(outcome):
    return [tuple(message["content"] for message in answered.messages) for answered in outcome.answered]


def test_lamini():
    seeds = [Seed(1, "Name a river in France.", None, None)]
    written = "".join(
        f"<example>{text}</example>"
        for text in ("Add 2 and 2.", "Name a river in Spain.", "Name the sea.", "add 2 and 2.", "Long?")
    )
    program = Lamini(calls=2, shown=1, asked=5, topics=None, topics_shown=1, near_copies=NEAR)
    answers = {"Write 5 new instructions": written, "Add 2": "4", "Name the sea": Written("The", False)}
    outcome, asked = run(program, seeds, {**answers, "Long?": Rejected("prompt too long")})
    assert conversations(outcome) == [("Add 2 and 2.", "4")]
    assert (outcome.requests, outcome.instructions, outcome.candidates) == (2, 10, 3)
    # The second call writes the same; of the first one the fourth is the first again.
    assert outcome.rejected == {
        "near-copy of a seed": 1,
        "written before": 6,
        "response cut off": 1,
        "prompt too long": 1,
    }
    # Two requests, five places each.
    assert sorted(asked) == [0, 1, 2, 4, 6]


def test_numbers_do_not_depend_on_the_filters():
    seeds = [Seed(1, "Name a river in France.", None, None)]
    written = "<example>Name a river in Spain.</example><example>Add 2 and 2.</example>"
    answers = {"Write 5 new instructions": written, "Add": "4", "Name": "The Ebro."}
    for distance, numbers in ((9, [0, 2]), (0, [0, 1, 2])):
        program = Lamini(1, 1, 5, None, 1, NearCopies(0.6, distance))
        _, asked = run(program, seeds, answers)
        assert sorted(asked) == numbers
        assert asked[2][0]["content"] == "Add 2 and 2."


def test_evol():
    seeds = [Seed(number, f"Tell me about {name}.", None, None) for number, name in enumerate("ABCDE", start=1)]
    answers = {
        "about A.\n</given>": "<prompt>Compare the wings of the kiwi and the emu.</prompt>",
        "about B.\n</given>": "<prompt>Explain at length why the sky over the sea is blue.</prompt>",
        "about C.\n</given>": "<prompt>Say it in other words, in a different order of things.</prompt>",
        "about D.\n</given>": "<prompt>Tell me about D.</prompt>",
        "about E.\n</given>": "no idea",
        "kiwi": "Both are small.",
        "sky": "Sorry, no.",
    }
    questions = []

    def same(asked):
        questions.extend(asked)
        return ["other words" in messages[0]["content"] for messages in asked]

    outcome, _ = run(Evol(1, NEAR), seeds, answers, same)
    assert conversations(outcome) == [("Compare the wings of the kiwi and the emu.", "Both are small.")]
    assert len(questions) == 3 and "Tell me about A." in questions[0][0]["content"]
    assert outcome.rejected == {
        "equal to its seed": 1,
        "no <prompt>": 1,
        "asks for the same as its seed": 1,
        "declined": 1,
    }
    assert (outcome.requests, outcome.instructions, outcome.candidates) == (5, 3, 2)


def test_a_question_that_is_too_long_and_a_request_that_is():
    seeds = [Seed(1, "A?", None, None), Seed(2, "B?", None, None)]
    answers = {"A?": "<prompt>Name the largest of all rivers.</prompt>", "B?": Rejected("prompt too long")}
    outcome, _ = run(Evol(1, NEAR), seeds, answers, lambda questions: [None])
    assert outcome.rejected == {"prompt too long": 1, "too long to compare": 1} and not outcome.answered


def test_orca_keeps_its_seeds_and_their_order():
    seeds = [Seed(1, "Is 7 prime?", "Yes", None), Seed(2, "Is 8 prime?", "No", None), Seed(3, "Is 9?", "No", None)]
    answers = {"Is 7": "Nothing divides it, so yes.", "Is 8": "2 divides it.", "Is 9": "  "}
    outcome, asked = run(Orca({"all": ("Explain.",)}, "all", NEAR), seeds, answers)
    assert conversations(outcome) == [
        ("Explain.", "Is 7 prime?", "Nothing divides it, so yes."),
        ("Explain.", "Is 8 prime?", "2 divides it."),
    ]
    assert sorted(asked) == [3, 4, 5] and outcome.rejected == {"empty response": 1}
