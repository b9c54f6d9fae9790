"""Table 1 in miniature: MHA, GQA-2 and MQA, by mean pooling and by the best conversion, fine-tuned to write docstrings.

The shipped T5 teacher, α = 5 %, the recipe of GQA §3.1 as `configs/finetune_docstring.py` has it for half its steps;
15 runs of 26 minutes on one CPU core.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The sweep."""
    config = ConfigDict(load_config(Path(__file__).parent / "groups.py").to_dict())
    config.runs.kv_heads = (8, 2, 1)
    config.runs.alpha = (0.05,)
    config.finetune = ConfigDict(
        dict(
            docstring=dict(
                config="configs/finetune_docstring.py",
                overrides=("--config.train.steps=500",),
                rows=500,
                inputs_length=256,
                max_new_tokens=64,
                metrics="rouge",
            )
        )
    )
    return config
