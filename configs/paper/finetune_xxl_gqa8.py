"""Fine-tunes GQA-8-XXL, uptrained by uptrain_xxl_gqa8.py, on the seven tasks of GQA's Table 1 (§3.1).

    for task in cnn_dailymail arxiv pubmed media_sum multi_news wmt14_en_de trivia_qa; do
        python -m gqa.train --config=configs/paper/finetune_xxl_gqa8.py --workdir=runs/paper/xxl-gqa8/$task \
            --config.model.checkpoint=runs/paper/xxl-gqa8/uptrained/model --config.data.task=$task
    done

Constant learning rate 0.001, batch 128, dropout 0.1, lengths of the tasks, as in configs/finetune_t5.py. For 64 chips,
v4:4x4x4. By floating-point operations alone (gqa.plan: 6.0e13 a step and chip at CNN/DailyMail's lengths, 2.1e14 at
arXiv's, with what is computed again) at 275 TFLOP/s: 0.22 and 0.77 s a step, 30,000 steps in 1.8 and 6.4 hours, 117 and
412 chip-hours, 375 and 1,325 USD at least.
To expect (Table 1): CNN/DailyMail ROUGE-1 43.5, arXiv 45.4, PubMed 47.7, MediaSum 36.3, Multi-News 47.2, WMT BLEU 28.4,
TriviaQA F1 81.6, average 47.1.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parents[1] / "finetune_t5.py").to_dict())
    config.model.size = "t5_1_1_xxl"
    config.model.changes = ConfigDict(dict(decoder_self_kv_heads=8, cross_kv_heads=8))
    config.model.checkpoint = config_dict.placeholder(str)
    config.model.remat = "full"
    config.data.vocabulary = "t5_1_1_xxl/spiece.model"
    config.mesh.data, config.mesh.fsdp = 4, 16
    return config
