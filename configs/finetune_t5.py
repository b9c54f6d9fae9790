"""Fine-tunes a T5.1.1 checkpoint, converted and uptrained or not, on a task of GQA's Table 1, with the paper's recipe.

    python -m gqa.train --config=configs/finetune_t5.py --workdir=runs/cnn --config.model.checkpoint=DIR \
        --config.data.vocabulary=DIR/spiece.model --config.data.task=cnn_dailymail

`--config.data.task` is one of cnn_dailymail, arxiv, pubmed, media_sum, multi_news, wmt14_en_de, trivia_qa; lengths and
prefix are the task's own (gqa/data/tasks.py). GQA §3.1: constant learning rate 0.001, batch 128, dropout 0.1, until
convergence, the best checkpoint on the development set. A batch here is 128 packed rows, of 128 examples or more: short
ones share a row. To expect with T5-Large, multi-head (Table 1): CNN/DailyMail ROUGE-1 42.9, arXiv 44.6, PubMed 46.2,
MediaSum 35.5, Multi-News 46.6, WMT BLEU 27.7, TriviaQA F1 78.2.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            model=dict(
                size=None,
                changes={},
                checkpoint=config_dict.placeholder(str),
                dropout_rate=0.1,
                dtype="bfloat16",
                param_dtype="float32",
                scan_layers=True,
                remat="dots",
            ),
            data=dict(
                task="cnn_dailymail",
                source=config_dict.placeholder(str),
                vocabulary=config_dict.placeholder(str),
                inputs_length=config_dict.placeholder(int),
                targets_length=config_dict.placeholder(int),
                fields=None,
                prefix=config_dict.placeholder(str),
            ),
            records=config_dict.placeholder(str),
            optimizer=dict(
                name="adafactor",
                schedule="constant",
                learning_rate=1e-3,
                decay_rate=0.8,
                clipping_threshold=1.0,
                multiply_by_parameter_scale=True,
            ),
            train=dict(
                steps=30_000,
                batch_size=128,
                accumulation=1,
                seed=0,
                z_loss=1e-4,
                log_every=100,
                eval_every=1000,
                eval_examples=2048,
                save_every=1000,
                keep=5,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            uptrain=None,
        )
    )
