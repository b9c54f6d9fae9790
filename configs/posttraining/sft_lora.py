"""Supervised fine-tuning as `sft.py`, of LoRA adapters of rank 8 on all linear maps.

The optimizer and the checkpoints hold the adapters alone. WORKDIR/adapter is for the peft library and
`checkpoints_tools.merge`, WORKDIR/model has it merged. h2oGPT drops 5 % of what adapters read,
`--config.adapter.dropout_rate=0.05`; without, a step takes four fifths of a full one's time (docs/posttraining.md).

    python -m gqa.train --config=configs/posttraining/sft_lora.py --workdir=runs/lora --config.data.source=chats.jsonl
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "sft.py", ["--config.data.source=."]).to_dict())
    config.data.source = config_dict.required_placeholder(str)
    config.adapter = ConfigDict(
        dict(kernels=("*",), rank=8, alpha=16.0, dropout_rate=0.0, rank_stabilised=False, base=None)
    )
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = None
    return config
