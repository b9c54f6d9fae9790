"""A Llama-like model of 58 million parameters in 2 GB of a CPU's memory: context 512, 32 new tokens; 5 to 9 minutes
on two cores.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The measurement."""
    config = ConfigDict(load_config(Path(__file__).parent / "llama_2_7b.py").to_dict())
    config.changes = dict(
        vocab_size=32000,
        d_model=512,
        num_heads=8,
        decoder_self_kv_heads=8,
        head_dim=64,
        d_ff=1408,
        num_layers=8,
        max_position=1024,
    )
    config.kv_heads = (1, 2, 8)
    config.dtype = "float32"
    config.memory_gb = 2.0
    config.context = 512
    config.new_tokens = 32
    return config
