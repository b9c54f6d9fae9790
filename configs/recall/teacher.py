"""Trains the teacher of the task of recall (`experiments/recall.py`): a T5.1.1 with 8 heads of 16 at every attention.

    python -m experiments.recall
    python -m gqa.train --config=configs/recall/teacher.py --workdir=runs/recall/teacher

12 minutes on one CPU core. It learns to answer between steps 200 and 500: held-out accuracy 0.999.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parents[1] / "teacher_t5.py").to_dict())
    config.model.changes.update(d_model=128, head_dim=16, d_ff=256, num_encoder_layers=2, num_decoder_layers=2)
    config.data = ConfigDict(
        dict(
            task="supervised",
            source="runs/recall/rows",
            vocabulary="assets/vocabulary/python_4096.model",
            inputs_length=66,
            targets_length=25,
            fields=dict(inputs="inputs", targets="targets"),
            prefix="",
        )
    )
    config.records = "runs/recall/records"
    config.train.update(steps=1000, batch_size=64)
    return config
