"""A reward model on what `sft.py` made: a head on the last token, ranking loss with a margin by rating (Llama 2 §3.2).

`--config.data.source=FILE.jsonl` are the preferences, `{"prompt", "chosen", "rejected", "rating"}` a line. The margins
are Llama 2's small ones, for negligibly better / unsure, slightly better, better, significantly better; a line without
a rating has none. Held-out accuracy is in the metrics, overall and of each rating. Llama 2's proportions: one epoch,
warm-up 3 %, cosine to a tenth; its rate at 7B is 1e-5.

    python -m gqa.train --config=configs/posttraining/reward.py --workdir=runs/reward \\
        --config.data.source=preferences.jsonl --config.model.checkpoint=runs/sft/model
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "sft.py", ["--config.data.source=."]).to_dict())
    config.data.source = config_dict.required_placeholder(str)
    config.data.task = "preferences"
    config.model.checkpoint = "runs/sft/model"
    config.reward = ConfigDict(dict(margins=(0.0, 1 / 3, 2 / 3, 1.0)))
    config.optimizer.learning_rate = 2e-4
    return config
