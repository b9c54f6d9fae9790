"""Figs. 4 and 5 in miniature on the task of recall: pooling and the best conversion, GQA-2 and MQA, α up to 10 %.

The teacher is trained first (`configs/recall/teacher.py`); 125 runs, about an hour and three quarters
on one CPU core.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The sweep."""
    config = ConfigDict(load_config(Path(__file__).parent / "groups.py").to_dict())
    config.teachers = ConfigDict(
        dict(recall=dict(checkpoint="runs/recall/teacher/model", uptrain="configs/recall/uptrain.py", kv_heads=8))
    )
    config.runs = ConfigDict(
        dict(
            method=("mean", "first", "random", "svd+group+refit"),
            kv_heads=(8, 2, 1),
            alpha=(0.0, 0.01, 0.02, 0.05, 0.1),
            seed=(1, 2, 3),
        )
    )
    config.calibration = ConfigDict(dict(calibrate="runs/recall/records", calibration_rows=256))
    return config
