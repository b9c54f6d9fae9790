"""Fine-tunes T5.1.1-XXL as it is, the multi-head baseline of GQA's Table 1 (§3.1).

The commands are those of finetune_xxl_gqa8.py with `finetune_xxl_mha`, runs/paper/xxl-mha and this checkpoint:
t5_1_1_xxl. 11.1 billion parameters, 14 % more than finetune_xxl_gqa8.py has, and so about 14 % more floating-point
operations: 2.1 hours at CNN/DailyMail's lengths and 7.3 at arXiv's, 133 and 470 chip-hours, 430 and 1,510 USD at least.
To expect (Table 1): CNN/DailyMail ROUGE-1 43.8, arXiv 45.6, PubMed 47.5, MediaSum 36.4, Multi-News 46.9, WMT BLEU 28.4,
TriviaQA F1 81.9, average 47.2.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "finetune_xxl_gqa8.py").to_dict())
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.changes = ConfigDict()
    return config
