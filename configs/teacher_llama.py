"""Pre-trains a Llama-like teacher: a decoder with RoPE and 8 key/value heads in every layer, on Python source.

Causal language modelling with AdamW and a cosine that ends at a tenth of its peak (Llama 2 §2.2), 12 million tokens.
What `experiments.conversion_methods --teacher=llama` expects in assets/teacher_llama:

    python -m gqa.train --config=configs/teacher_llama.py --workdir=runs/teacher_llama
    python -m checkpoints_tools.convert --source=runs/teacher_llama/model --output=assets/teacher_llama --kv_heads=8 \\
        --method=mean --dtype=bfloat16
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            model=dict(
                size="llama_2_7b",
                changes=dict(
                    vocab_size=4096,
                    d_model=192,
                    num_heads=8,
                    head_dim=32,
                    d_ff=512,
                    num_layers=6,
                    decoder_self_kv_heads=8,
                    max_position=256,
                    tied_logits=True,
                ),
                checkpoint=None,
                dropout_rate=0.0,
                dtype="float32",
                param_dtype="float32",
                scan_layers=False,
                remat="none",
            ),
            data=dict(
                task="causal_lm",
                source="embedded_large",
                vocabulary="assets/vocabulary/python_4096.model",
                inputs_length=256,
                targets_length=None,
            ),
            records=None,
            optimizer=dict(
                name="adamw",
                schedule="cosine",
                learning_rate=2e-3,
                warmup_steps=150,
                decay_steps=3000,
                final_ratio=0.1,
                clip_norm=1.0,
                beta1=0.9,
                beta2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
            ),
            train=dict(
                steps=3000,
                batch_size=16,
                accumulation=1,
                seed=0,
                z_loss=1e-4,
                log_every=20,
                eval_every=250,
                eval_examples=256,
                save_every=250,
                keep=2,
                keep_minutes=None,
                mirror=None,
                skip_above=None,
                roll_back_after=None,
                peak_tflops=None,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            uptrain=None,
        )
    )
