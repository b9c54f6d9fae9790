"""Fine-tunes T5.1.1-Large as it is, the smaller multi-head baseline of GQA's Table 1 (§3.1).

The commands are those of finetune_xxl_gqa8.py with `finetune_large_mha`, runs/paper/large-mha and this checkpoint:
t5_1_1_large. 0.78 billion parameters, 7 % more than finetune_large_gqa8.py has, at about 8 % of the cost of
finetune_xxl_gqa8.py. To expect (Table 1): CNN/DailyMail ROUGE-1 42.9, arXiv 44.6, PubMed 46.2, MediaSum 35.5,
Multi-News 46.6, WMT BLEU 27.7, TriviaQA F1 78.2, average 46.0 at 0.37 s a sample.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "finetune_large_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.changes = ConfigDict()
    return config
