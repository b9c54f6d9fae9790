"""Llama-2-7B shapes: context 2048, 128 new tokens, as Llama 2's own comparison has them (appendix A.2.1, fig. 24).

Random weights in bfloat16, 13 GB: for an accelerator.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The measurement."""
    return ConfigDict(
        dict(
            size="llama_2_7b",
            changes=dict(),
            kv_heads=(1, 8, 32),
            dtype="bfloat16",
            memory_gb=None,  # for weights, caches and what a step needs; None: what the device has
            context=2048,
            new_tokens=128,
            repetitions=3,
        )
    )
