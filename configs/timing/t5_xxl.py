"""Fig. 6 of GQA: T5-XXL's time per sample against its number of groups, input 2048, output 512, batch up to 32.

Random weights in bfloat16: 22 GB, so for an accelerator of 80 GB or more. The byte model predicts MHA : GQA-8 : MQA as
4.0 : 1.3 : 1 at equal batch (GQA §3.1 and fig. 6 also have MHA's smaller feasible batch in their 5.4 and 6.3).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The measurement."""
    return ConfigDict(
        dict(
            size="t5_1_1_xxl",
            changes=dict(),
            kv_heads=(1, 4, 8, 16, 32, 64),
            dtype="bfloat16",
            weights=(None,),  # with cache, a pair for each row: None, int8 or int4
            cache=(None,),  # None or int8
            max_batch_size=32,
            inputs_length=2048,
            new_tokens=512,
            repetitions=3,
            num_prompts=0,  # of mixed length, with and without continuous batching (decoders); 0: none
            num_drafted=4,  # tokens that a draft proposes; 0: no speculation
            draft_kv_heads=1,  # key/value heads of the draft, made by conversion
            split_k=False,  # the kernel of that name where it applies (GPU)
        )
    )
