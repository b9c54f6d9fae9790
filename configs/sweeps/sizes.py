"""Fig. 3 in miniature: MHA, GQA-2 and MQA, mean pooled and uptrained for 5 %, of a smaller and a larger teacher.

The shipped T5 teacher, and one of half its width (`configs/teacher_t5_small.py`); 18 runs, about an hour on two CPU
cores.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The sweep."""
    config = ConfigDict(load_config(Path(__file__).parent / "groups.py").to_dict())
    config.teachers.t5_small = dict(config.teachers.t5, checkpoint="runs/teacher_small/model")
    config.runs = ConfigDict(dict(method=("mean",), kv_heads=(8, 2, 1), alpha=(0.05,), seed=(1, 2, 3)))
    return config
