"""Supervised fine-tuning of a Llama-like checkpoint on conversations, with the loss on responses only (Llama 2 §3.1).

`--config.data.source=FILE.jsonl` are the conversations, one a line (`python -m gqa.data.templates --help` says how),
or preferences, of which it learns the chosen responses. A cosine with the proportions of Llama 2, its rate that of a
model of 4 million parameters: for Llama-2-7B, `--config.optimizer.learning_rate=2e-5` and inputs_length=4096.

    python -m gqa.train --config=configs/posttraining/sft.py --workdir=runs/sft --config.data.source=chats.jsonl
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            model=dict(
                size=None,
                changes={},
                checkpoint="assets/teacher_llama",
                dropout_rate=0.0,
                dtype="float32",
                param_dtype="float32",
                scan_layers=False,
                remat="none",
            ),
            data=dict(
                task="sft",
                source=config_dict.required_placeholder(str),
                vocabulary="assets/vocabulary/python_4096.model",
                inputs_length=256,
                targets_length=None,
                template="openbezoar",
            ),
            records=None,
            optimizer=dict(
                name="adamw",
                schedule="cosine",
                learning_rate=5e-4,
                warmup_steps=10,
                decay_steps=300,
                final_ratio=0.1,
                clip_norm=1.0,
                beta1=0.9,
                beta2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
            ),
            train=dict(
                steps=300,
                batch_size=16,
                accumulation=1,
                seed=0,
                z_loss=0.0,
                log_every=10,
                eval_every=50,
                eval_examples=128,
                save_every=100,
                keep=2,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            uptrain=None,
        )
    )
