"""Rejection sampling from what `sft.py` made: of several samples a prompt the one that scores best (Llama 2 §3.2.3).

`--config.prompts=FILE.jsonl` are prompts, conversations or preferences; the output is conversations for `sft.py`.
Llama 2 keeps the best of *all* rounds, or what an early round was good at is forgotten: from the second round on,
`--config.former=` is the output of the round before. Beside the output, FILE.json, FILE.md and FILE.png say how the
best and the median score grow with the number of samples at each temperature (Llama 2 figures 7 and 8): where the best
temperature lies moves while the model is trained, so look each round.

    python -m gqa.rejection_sampling --config=configs/posttraining/rejection_sampling.py --output=runs/round1.jsonl \\
        --config.prompts=prompts.jsonl
    python -m gqa.train --config=configs/posttraining/sft.py --workdir=runs/rejection1 \\
        --config.data.source=runs/round1.jsonl --config.model.checkpoint=runs/sft/model
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The round."""
    return ConfigDict(
        dict(
            policy="runs/sft/model",
            reward="runs/reward/model",
            safety=config_dict.placeholder(str),
            safety_gate=0.15,
            prompts=config_dict.required_placeholder(str),
            former=config_dict.placeholder(str),
            template="openbezoar",
            vocabulary="assets/vocabulary/python_4096.model",
            inputs_length=192,
            new_tokens=64,
            temperatures=(0.7, 1.0, 1.3),
            samples=16,
            batch_size=64,
            seed=0,
            dtype="float32",
        )
    )
