"""Fine-tunes T5.1.1-Large with one key/value head, uptrained by uptrain_large_mqa.py: its fig. 4.

The commands are those of finetune_xxl_gqa8.py with `finetune_large_mqa`, runs/paper/large-mqa and this checkpoint:
runs/paper/large-mqa/uptrained/model. It needs the tasks cnn_dailymail, multi_news and trivia_qa, at most 7 % of
the cost of finetune_xxl_gqa8.py each. To expect (read off fig. 4): about 55.6 on their average.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "finetune_large_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.changes.decoder_self_kv_heads = config.model.changes.cross_kv_heads = 1
    return config
