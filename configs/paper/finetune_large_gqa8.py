"""Fine-tunes T5.1.1-Large with 8 key/value heads, uptrained by uptrain_large_gqa8.py, on the tasks of GQA's Table 1.

The commands are those of finetune_xxl_gqa8.py with `finetune_large_gqa8`, runs/paper/large-gqa8 and this checkpoint:
runs/paper/large-gqa8/uptrained/model. By its floating-point operations 7 % of the cost of finetune_xxl_gqa8.py. To
expect: MHA-Large's scores (finetune_large_mha.py) or a little less; the paper has no figure.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "finetune_xxl_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.size = "t5_1_1_large"
    config.data.vocabulary = "t5_1_1_large/spiece.model"
    config.mesh.data, config.mesh.fsdp = 64, 1
    return config
