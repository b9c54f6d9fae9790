"""The smaller T5 teacher's shapes, timed as the shipped one's: batch 8, input 2048, 512 new tokens, float32.

With `--output=DIR/t5_small`, experiments.figures sets its times beside the scores of the sweep of sizes.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The measurement."""
    folder = Path(__file__).parent
    config = ConfigDict(load_config(folder / "teacher_t5.py").to_dict())
    config.changes = ConfigDict(load_config(folder.parent / "teacher_t5_small.py").model.changes.to_dict())
    return config
