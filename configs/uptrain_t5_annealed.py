"""Uptrains a conversion of the annealed T5 teacher on the data, objective and schedule of its pre-training (GQA §2.1).

`--config.model.checkpoint=DIR` names the converted checkpoint. The inverse root of the step goes on behind both parts
of the pre-training, as if there had been no annealing between: `--config.optimizer.learning_rate` multiplies it.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    folder = Path(__file__).parent
    config = load_config(folder / "uptrain_t5_teacher.py")
    config.uptrain.original_steps += load_config(folder / "teacher_t5_annealed.py").train.steps
    return config
