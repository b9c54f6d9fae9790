"""Quality against the number of key/value heads, 1 to 8, by mean pooling and by a calibrated conversion.

The shipped T5 teacher; 34 runs, about an hour and a half on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The sweep."""
    return ConfigDict(
        dict(
            # Name -> its checkpoint, the config that goes on with its pre-training, and its number of key/value heads.
            teachers=dict(t5=dict(checkpoint="assets/teacher", uptrain="configs/uptrain_t5_teacher.py", kv_heads=8)),
            runs=dict(
                method=("mean", "svd+group+refit"),
                kv_heads=(8, 4, 2, 1),
                alpha=(0.0, 0.05),
                seed=(1, 2, 3),
            ),
            # Of methods that look at text: options of checkpoints_tools.convert.
            calibration=dict(calibrate="embedded_large", calibration_length=128),
            # Of the uptraining and of the scores.
            overrides=("--config.train.eval_every=1000000",),
            # Task -> the config that fine-tunes on it and changes to it, and how its held-out examples are scored.
            finetune=dict(),
            keep_checkpoints=False,
        )
    )
