"""Pre-trains the shipped teacher's smaller sister: half the width everywhere, the same layers, heads, data and steps.

    python -m gqa.train --config=configs/teacher_t5_small.py --workdir=runs/teacher_small

1.7 million parameters, an hour and a half on one CPU core. `configs/sweeps/sizes.py` sets it beside the shipped one, as
the GQA paper sets T5 Large beside XXL.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "teacher_t5.py").to_dict())
    config.model.changes.update(d_model=96, head_dim=16, d_ff=256)
    return config
