"""Uptrains Llama-2-7B, converted to GQA-8: α = 0.05 of its pre-training, 2 trillion tokens in batches of 1024 x 4096,
with Llama 2's own AdamW and cosine (§2.2), which goes on at its end, a tenth of the peak.

What it takes is `python -m gqa.plan --config=configs/uptrain_llama_2_7b_gqa8.py --topology=v5p:4x4x4`. To run it, put
text in `text/`, the public checkpoint in `llama-2-7b/`, convert that one to `llama-2-7b-gqa8/` and add
`--config.model.checkpoint=llama-2-7b-gqa8`. Llama 2 has no uptraining to compare with; its comparison is from scratch.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            model=dict(
                size="llama_2_7b",
                changes=dict(decoder_self_kv_heads=8),
                checkpoint=config_dict.placeholder(str),
                dropout_rate=0.0,
                dtype="bfloat16",
                param_dtype="float32",
                scan_layers=True,
                remat="full",
            ),
            data=dict(
                task="causal_lm",
                source="text",
                vocabulary="llama-2-7b/tokenizer.model",
                inputs_length=4096,
                targets_length=None,
            ),
            records=None,
            optimizer=dict(
                name="adamw",
                schedule="cosine",
                learning_rate=3e-4,
                clip_norm=1.0,
                warmup_steps=2000,
                decay_steps=477_000,
                final_ratio=0.1,
                beta1=0.9,
                beta2=0.95,
                epsilon=1e-5,
                weight_decay=0.1,
            ),
            train=dict(
                steps=None,
                batch_size=1024,
                accumulation=1,
                seed=0,
                z_loss=0.0,
                log_every=10,
                eval_every=500,
                eval_examples=512,
                save_every=500,
                keep=2,
            ),
            mesh=dict(data=1, fsdp=-1, tensor=1),
            uptrain=dict(original_steps=477_000, alpha=0.05),
        )
    )
