"""GQA-8-XXL of GQA's Table 1: T5.1.1-XXL with 8 key/value heads, uptrained for α = 0.05 on C4 (GQA §2.1, §3.1).

    python -m checkpoints_tools.convert --source=t5_1_1_xxl --output=runs/paper/xxl-gqa8/converted --kv_heads=8 \
        --method=mean --dtype=float32
    python -m gqa.train --config=configs/paper/uptrain_xxl_gqa8.py --workdir=runs/paper/xxl-gqa8/uptrained \
        --config.model.checkpoint=runs/paper/xxl-gqa8/converted

For 64 chips, v4:4x4x4. Its plan (experiments/results/plan/uptrain_t5_xxl_gqa8_v4_4x4x4.md): 9.73 billion parameters,
21.0 of 30.75 GiB a chip, 2.69 to 4.39 s a step, 50,000 steps in 37 to 61 hours, 2,387 chip-hours and 7,686 USD at
least. To expect once fine-tuned (finetune_xxl_gqa8.py): 47.1 on average at 0.28 s a sample; MHA-XXL has 47.2 at 1.51 s.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parents[1] / "uptrain_t5_xxl_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.data.task, config.data.source, config.data.targets_length = "c4_span_corruption", None, None
    config.mesh.data, config.mesh.fsdp = 4, 16
    return config
