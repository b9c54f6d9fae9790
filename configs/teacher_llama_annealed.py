"""How far the Llama-like teacher is from its plateau: a quarter of its training more, the rate falling to zero.

python -m gqa.train --config=configs/teacher_llama_annealed.py --workdir=runs/teacher_llama_annealed
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    teacher = load_config(Path(__file__).parent / "teacher_llama.py")
    config = ConfigDict(teacher.to_dict())
    config.model.size = None
    config.model.changes = ConfigDict()
    config.model.checkpoint = "assets/teacher_llama"
    config.train.steps = teacher.train.steps // 4
    config.train.seed = 1  # rows in an order that the teacher has not seen
    config.optimizer.learning_rate = teacher.optimizer.learning_rate / 2
    config.optimizer.warmup_steps = 50  # AdamW's moments start afresh
    config.optimizer.decay_steps = config.train.steps
    config.optimizer.final_ratio = 0.0
    return config
