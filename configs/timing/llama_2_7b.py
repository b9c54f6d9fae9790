"""Llama-2-7B shapes: time per sample against the number of groups, prompt 2048, output 512, batch up to 32.

Random weights in bfloat16: 13 GB.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The measurement."""
    return ConfigDict(
        dict(
            size="llama_2_7b",
            changes=dict(),
            kv_heads=(1, 4, 8, 32),
            dtype="bfloat16",
            weights=(None,),  # with cache, a pair for each row: None, int8 or int4
            cache=(None,),  # None or int8
            max_batch_size=32,
            inputs_length=2048,
            new_tokens=512,
            repetitions=3,
        )
    )
