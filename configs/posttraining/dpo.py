"""Direct preference optimisation of what `sft.py` made (OpenBezoar's second step: β = 0.1, one epoch).

`--config.data.source=FILE.jsonl` are the preferences, `{"prompt", "chosen", "rejected"}` a line; the first step is
`sft.py` on the same file, so that the reference puts mass on the chosen responses. The reference's log-probabilities
are computed once and kept beside the records. Held-out loss starts at log 2 = 0.6931; `accuracy` is that of the
implicit reward.

    python -m gqa.train --config=configs/posttraining/sft.py --workdir=runs/sft --config.data.source=preferences.jsonl
    python -m gqa.train --config=configs/posttraining/dpo.py --workdir=runs/dpo \\
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
    config.dpo = ConfigDict(
        dict(beta=0.1, loss="sigmoid", label_smoothing=0.0, length_normalised=False, reference="cached")
    )
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = None
    return config
