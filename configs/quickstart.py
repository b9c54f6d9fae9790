"""Uptrains the quickstart's GQA-2 conversion for 90 seconds to two minutes on two CPU cores.

As `configs/uptrain_t5_teacher.py`, with the α that this time allows.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "uptrain_t5_teacher.py").to_dict())
    config.uptrain.alpha = 0.025
    config.train.eval_examples = 512
    config.train.eval_every = 1000
    return config
