"""Fig. 5 in miniature: quality against the share α of the pre-training that uptraining takes, for GQA-2 and MQA.

The shipped T5 teacher; 69 runs, about four hours on two CPU cores.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The sweep."""
    config = ConfigDict(load_config(Path(__file__).parent / "groups.py").to_dict())
    config.runs.kv_heads = (8, 2, 1)
    config.runs.alpha = (0.0, 0.01, 0.02, 0.05, 0.1)
    return config
