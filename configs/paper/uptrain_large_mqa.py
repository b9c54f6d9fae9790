"""T5.1.1-Large with one key/value head, uptrained for α = 0.05 on C4: the model of GQA's fig. 4.

    python -m checkpoints_tools.convert --source=t5_1_1_large --output=runs/paper/large-mqa/converted --kv_heads=1 \
        --method=mean --dtype=float32
    python -m gqa.train --config=configs/paper/uptrain_large_mqa.py --workdir=runs/paper/large-mqa/uptrained \
        --config.model.checkpoint=runs/paper/large-mqa/converted

For 64 chips, v4:4x4x4, and no more than uptrain_large_gqa8.py takes. To expect once fine-tuned on CNN/DailyMail,
Multi-News and TriviaQA (read off fig. 4): about 55.6 on average from mean pooling, 55.1 to 55.4 with `--method=first`,
54.6 to 55.2 with `--method=random`.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "uptrain_large_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.changes.decoder_self_kv_heads = config.model.changes.cross_kv_heads = 1
    return config
