"""Brings the T5 teacher near its plateau: a quarter of its training more, the rate falling to zero.

The shipped teacher was stopped at a full learning rate, so that any uptraining, even of the teacher itself, gains: a
comparison of conversions before uptraining with others after it then measures that gain. What
`experiments.conversion_methods --teacher=t5_annealed` expects in assets/teacher_annealed:

    python -m gqa.train --config=configs/teacher_t5_annealed.py --workdir=runs/teacher_annealed
    python -m checkpoints_tools.convert --source=runs/teacher_annealed/model --output=assets/teacher_annealed \\
        --kv_heads=8 --method=mean --dtype=bfloat16
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    teacher = load_config(Path(__file__).parent / "teacher_t5.py")
    config = ConfigDict(teacher.to_dict())
    config.model.size = None
    config.model.changes = ConfigDict()
    config.model.checkpoint = "assets/teacher"
    config.train.steps = teacher.train.steps // 4
    config.train.seed = 1  # rows in an order that the teacher has not seen
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = teacher.optimizer.learning_rate / teacher.train.steps**0.5
    config.optimizer.warmup_steps = 50  # Adafactor's moments start afresh
    config.optimizer.decay_steps = config.train.steps
    config.optimizer.final_ratio = 0.0
    return config
