"""MHA, GQA-2 and MQA trained from scratch at equal parameters (Llama 2, appendix A.2.1), on the task of recall.

Their training losses are the figure of stability (GQA, appendix A); 9 runs, about two hours on one CPU core.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The sweep."""
    config = ConfigDict(load_config(Path(__file__).parent / "groups.py").to_dict())
    config.teachers = ConfigDict(dict(recall=dict(pretrain="configs/recall/teacher.py", kv_heads=8)))
    config.runs = ConfigDict(dict(method=("scratch",), kv_heads=(8, 2, 1), alpha=(1.0,), seed=(1, 2, 3)))
    config.overrides = ()
    return config
