"""Fig. 4 in miniature: mean, first, random and the best conversion at α = 0 and 5 %, for GQA-2 and MQA.

The shipped T5 teacher; 44 runs, about two hours on two CPU cores.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The sweep."""
    config = ConfigDict(load_config(Path(__file__).parent / "groups.py").to_dict())
    config.runs.kv_heads = (8, 2, 1)
    config.runs.method = ("mean", "first", "random", "svd+group+refit")
    return config
