"""Uptrains a conversion of the Llama-like teacher on the data and objective of its pre-training (GQA §2.1).

`--config.model.checkpoint=DIR` names the converted checkpoint. The schedule goes on at the original step, where the
cosine has reached its end, a tenth of the peak.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    teacher = load_config(Path(__file__).parent / "teacher_llama.py")
    config = ConfigDict(teacher.to_dict())
    config.uptrain = ConfigDict(dict(original_steps=teacher.train.steps, alpha=0.05))
    config.model.size = None
    config.model.changes = ConfigDict()
    config.model.checkpoint = config_dict.placeholder(str)
    config.train.steps = None
    config.train.seed = 1
    config.train.log_every = 10
    return config
