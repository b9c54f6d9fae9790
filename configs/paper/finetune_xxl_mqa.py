"""Fine-tunes MQA-XXL, uptrained by uptrain_xxl_mqa.py, on the seven tasks of GQA's Table 1 (§3.1).

The commands are those of finetune_xxl_gqa8.py with `finetune_xxl_mqa`, runs/paper/xxl-mqa and this checkpoint:
runs/paper/xxl-mqa/uptrained/model. The cost is at most that of finetune_xxl_gqa8.py. To expect (Table 1):
CNN/DailyMail ROUGE-1 43.0, arXiv 45.0, PubMed 46.9, MediaSum 36.1, Multi-News 46.5, WMT BLEU 28.5, TriviaQA F1 81.3,
average 46.6.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "finetune_xxl_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.changes.decoder_self_kv_heads = config.model.changes.cross_kv_heads = 1
    return config
