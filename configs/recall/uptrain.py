"""Uptrains a conversion of the teacher of recall on the rows and the schedule of its training (GQA §2.1).

`--config.model.checkpoint=DIR` names the converted checkpoint.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    teacher = load_config(Path(__file__).parent / "teacher.py")
    config = ConfigDict(teacher.to_dict())
    config.uptrain = ConfigDict(dict(original_steps=teacher.train.steps, alpha=0.05))
    config.model.size = None
    config.model.changes = ConfigDict()
    config.model.checkpoint = config_dict.placeholder(str)
    config.train.update(steps=None, seed=1, log_every=10)
    return config
