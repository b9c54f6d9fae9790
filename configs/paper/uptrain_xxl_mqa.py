"""MQA-XXL of GQA's Table 1: T5.1.1-XXL with one key/value head, uptrained for α = 0.05 on C4 (GQA §2.1, §3.1).

    python -m checkpoints_tools.convert --source=t5_1_1_xxl --output=runs/paper/xxl-mqa/converted --kv_heads=1 \
        --method=mean --dtype=float32
    python -m gqa.train --config=configs/paper/uptrain_xxl_mqa.py --workdir=runs/paper/xxl-mqa/uptrained \
        --config.model.checkpoint=runs/paper/xxl-mqa/converted

For 64 chips, v4:4x4x4. It has 9.55 billion parameters, 2 % fewer than uptrain_xxl_gqa8.py, whose plan is an upper bound
of its own: 21.0 of 30.75 GiB a chip, 37 to 61 hours, 7,686 USD at least. To expect once fine-tuned
(finetune_xxl_mqa.py): 46.6 on average at 0.24 s a sample, where MHA-XXL has 47.2 at 1.51 s.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "uptrain_xxl_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.changes.decoder_self_kv_heads = config.model.changes.cross_kv_heads = 1
    return config
