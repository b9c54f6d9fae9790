"""A Llama-like model of 220 million parameters on a CPU: prompt 512, 64 new tokens, batch 4; about 12 minutes on two
cores.

Every way to make the bytes of a step fewer has a row: key/value heads, weights in int8 and int4, the cache in int8;
below, continuous batching and speculation.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The measurement."""
    config = ConfigDict(load_config(Path(__file__).parent / "llama_2_7b.py").to_dict())
    config.changes = dict(
        vocab_size=32000,
        d_model=1024,
        num_heads=16,
        decoder_self_kv_heads=16,
        head_dim=64,
        d_ff=2816,
        num_layers=12,
        max_position=1024,
    )
    config.kv_heads = (1, 4, 16)
    config.dtype = "float32"
    config.weights = (None, "int8", "int4", None)
    config.cache = (None, None, None, "int8")
    config.max_batch_size = 4
    config.inputs_length = 512
    config.new_tokens = 64
    config.num_prompts = 16
    return config
