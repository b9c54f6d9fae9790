"""Fine-tunes Llama-2-70B on plain text at 4096 tokens with the settings of Llama 2's SFT: batch 64, AdamW, cosine from
2e-5. All tokens are targets (causal language modelling), so the cost is SFT's and the loss is not.

What it takes is `python -m gqa.plan --config=configs/finetune_llama_2_70b.py --topology=v5p:4x4x8`. To run it, put text
in `text/`, the checkpoint in `llama-2-70b/` and add `--config.model.checkpoint=llama-2-70b`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            model=dict(
                size="llama_2_70b",
                changes=dict(),
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
                vocabulary="llama-2-70b/tokenizer.model",
                inputs_length=4096,
                targets_length=None,
            ),
            records=None,
            optimizer=dict(
                name="adamw",
                schedule="cosine",
                learning_rate=2e-5,
                clip_norm=1.0,
                warmup_steps=30,
                decay_steps=860,
                final_ratio=0.1,
                beta1=0.9,
                beta2=0.95,
                epsilon=1e-5,
                weight_decay=0.1,
            ),
            train=dict(
                steps=860,  # two epochs of 27,540 examples (Llama 2 §3.1)
                batch_size=64,
                accumulation=1,
                seed=0,
                z_loss=0.0,
                log_every=10,
                eval_every=100,
                eval_examples=64,
                save_every=100,
                keep=2,
            ),
            mesh=dict(data=1, fsdp=-1, tensor=1),
            uptrain=None,
        )
    )
