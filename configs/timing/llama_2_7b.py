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
            num_prompts=128,  # of mixed length, with and without continuous batching (decoders); 0: none
            num_drafted=4,  # tokens that a draft proposes; 0: no speculation
            draft_kv_heads=1,  # key/value heads of the draft, made by conversion
            split_k=False,  # the kernel of that name where it applies (GPU)
        )
    )
