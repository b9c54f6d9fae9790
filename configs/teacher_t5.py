"""Pre-trains the shipped teacher: a T5.1.1 encoder-decoder with 8 heads at every attention, on Python source.

Span corruption exactly as T5's, Adafactor with T5's settings; `assets/README.md` has the command, the cost and the
held-out loss to expect.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            model=dict(
                size="t5_1_1_small",
                changes=dict(
                    vocab_size=4096,
                    d_model=192,
                    num_heads=8,
                    head_dim=32,
                    d_ff=512,
                    num_encoder_layers=3,
                    num_decoder_layers=3,
                    encoder_self_kv_heads=8,
                    decoder_self_kv_heads=8,
                    cross_kv_heads=8,
                ),
                checkpoint=None,
                dropout_rate=0.0,
                dtype="float32",
                param_dtype="float32",
                scan_layers=False,
                remat="none",
            ),
            data=dict(
                task="span_corruption",
                source="embedded_large",
                vocabulary="assets/vocabulary/python_4096.model",
                inputs_length=128,
                targets_length=None,
            ),
            records=None,
            optimizer=dict(
                name="adafactor",
                schedule="rsqrt",
                learning_rate=1.0,
                warmup_steps=1000,
                decay_rate=0.8,
                clipping_threshold=1.0,
                multiply_by_parameter_scale=True,
            ),
            train=dict(
                steps=6000,
                batch_size=32,
                accumulation=1,
                seed=0,
                z_loss=1e-4,
                log_every=20,
                eval_every=250,
                eval_examples=512,
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
