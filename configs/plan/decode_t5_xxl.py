"""Decoding T5-XXL as GQA §3.1 times it: 2048 tokens in, 512 out, 32 rows a chip; MHA, GQA-8 and MQA.

`python -m gqa.plan --config=configs/plan/decode_t5_xxl.py --topology=v4:2x2x2` says what fits and how fast it can be;
on 8 such chips the paper has 1.51, 0.28 and 0.24 s a sample and chip.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """What is decoded."""
    return ConfigDict(
        dict(
            size="t5_1_1_xxl",
            changes=dict(),
            kv_heads=(64, 8, 1),
            dtype="bfloat16",
            cache_dtype=None,
            batch_size_per_device=32,
            inputs_length=2048,
            new_tokens=512,
            mesh=dict(data=1, fsdp=1, tensor=-1),
        )
    )
