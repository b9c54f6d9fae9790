"""T5.1.1-Large with 8 key/value heads, uptrained for α = 0.05 on C4 as GQA uptrains T5-XXL (§2.1, §3.1).

    python -m checkpoints_tools.convert --source=t5_1_1_large --output=runs/paper/large-gqa8/converted --kv_heads=8 \
        --method=mean --dtype=float32
    python -m gqa.train --config=configs/paper/uptrain_large_gqa8.py --workdir=runs/paper/large-gqa8/uptrained \
        --config.model.checkpoint=runs/paper/large-gqa8/converted

For 64 chips, v4:4x4x4. Its plan (experiments/results/plan/uptrain_large_gqa8_v4_4x4x4.md): 0.73 billion parameters,
12.5 of 30.75 GiB a chip, 0.29 to 0.50 s a step, 50,000 steps in 4.0 to 6.9 hours, 254 chip-hours and 819 USD at least.
To expect once fine-tuned: between MHA-Large's 46.0 (Table 1) and what MQA-Large keeps of it; the paper has no figure.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "uptrain_xxl_gqa8.py").to_dict())
    config.model.size = "t5_1_1_large"
    config.model.checkpoint = config_dict.placeholder(str)
    config.data.vocabulary = "t5_1_1_large/spiece.model"
    config.mesh.data, config.mesh.fsdp = 64, 1
    return config
