"""Orca's data from a checkpoint: explanations of known answers, in the manner that a system message asks for.

Every seed has an answer, which guides the parent and is left out of the conversation, and may name its `"submixture"`,
which decides among which system messages one is drawn (in our words; Orca has 16). OpenBezoar's judge accepted 16.7 %.

    python -m gqa.instructions --config=configs/posttraining/instructions_orca.py --output=runs/orca.jsonl \\
        --config.seeds=flan.jsonl
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config

STEPS = "Work the task out in steps, and give the reason for each of them."
TEACHER = "You are a teacher. Explain the task in simple words first, then solve it."
CHILD = "You explain things so that a child of five can follow."
DETAIL = "You are a thorough assistant: answer at length, so that nobody has to look anything up elsewhere."
GUIDELINES = "First say which rules the task goes by, then use them one after the other to get to the answer."
FACTS = "Help people to find what they ask for. Say which facts the answer rests on."


def get_config() -> ConfigDict:
    """The run."""
    path = Path(__file__).parent / "instructions_lamini.py"
    config = ConfigDict(load_config(path, ["--config.seeds=."]).to_dict())
    config.seeds = config_dict.required_placeholder(str)
    del config.lamini
    config.orca = ConfigDict(
        dict(
            systems=dict(
                cot=(STEPS, CHILD, ""),
                niv2=(GUIDELINES, TEACHER, DETAIL),
                t0=(FACTS, DETAIL, CHILD, STEPS, ""),
                flan2021=(TEACHER, GUIDELINES, STEPS, FACTS),
            ),
            default="t0",
            near_copies=dict(similarity=0.6, distance=9),
        )
    )
    return config
