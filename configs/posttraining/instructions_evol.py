"""Evol-Instruct's data from a checkpoint: seeds made harder in one of four ways, or others like them, and responses.

What did not evolve is eliminated: a prompt equal to its seed or a near-copy of any, one that names its request, one
that the parent says asks for the same as its seed, one it declines to answer. A round of evolution; the next one reads
the output of this one: `--config.seeds=runs/evol1.jsonl`. OpenBezoar's judge accepted 68.0 %.

    python -m gqa.instructions --config=configs/posttraining/instructions_evol.py --output=runs/evol1.jsonl \\
        --config.seeds=chats.jsonl
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    path = Path(__file__).parent / "instructions_lamini.py"
    config = ConfigDict(load_config(path, ["--config.seeds=."]).to_dict())
    config.seeds = config_dict.required_placeholder(str)
    del config.lamini
    config.evol = ConfigDict(dict(methods=1, near_copies=dict(similarity=0.6, distance=9)))
    return config
