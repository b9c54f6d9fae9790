"""Long input on a CPU: T5.1.1 base shapes, batch 8, input 2048, 64 new tokens, float32; about 20 minutes on two cores.

The byte model predicts the ratios of MHA, GQA-2 and MQA.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The measurement."""
    config = ConfigDict(load_config(Path(__file__).parent / "t5_xxl.py").to_dict())
    config.size = "t5_1_1_base"
    config.kv_heads = (1, 2, 4, 12)
    config.dtype = "float32"
    config.max_batch_size = 8
    config.new_tokens = 64
    return config
