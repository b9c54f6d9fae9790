"""Supervised fine-tuning as `sft_lora.py`, on a base in 4 bits: NF4 with double quantisation (QLoRA, 2305.14314).

The layers' kernels take 0.52 bytes a weight instead of 4, and are quantised a layer at a time when they are read. The
adapters are float32. `--config.adapter.base=int8` is closer to the checkpoint, at twice the memory. WORKDIR/adapter is
all that comes out; the model is

    python -m gqa.train --config=configs/posttraining/sft_qlora.py --workdir=runs/qlora --config.data.source=chats.jsonl
    python -m checkpoints_tools.merge --checkpoint=assets/teacher_llama --adapter=runs/qlora/adapter --base=nf4 \\
        --output=runs/qlora/model
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "sft_lora.py", ["--config.data.source=."]).to_dict())
    config.data.source = config_dict.required_placeholder(str)
    config.adapter.base = "nf4"
    return config
