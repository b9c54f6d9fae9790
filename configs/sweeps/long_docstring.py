"""Table 1 on long inputs: MHA, GQA-2 and MQA by mean pooling, fine-tuned to write the docstrings of whole modules.

As `docstring.py`, on its longer task: the first 1,024 tokens of a module instead of 256 of a function, up to 128 tokens
of its docstring, 300 steps of 4 packed rows: half the modules that there are. All held-out ones are scored.
9 runs of 34 minutes on one CPU core.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The sweep."""
    config = ConfigDict(load_config(Path(__file__).parent / "docstring.py").to_dict())
    config.runs.method = ("mean",)
    task = config.finetune.docstring
    task.inputs_length, task.max_new_tokens = 1024, 128
    task.overrides = (
        "--config.data.task=long_docstring",
        f"--config.data.inputs_length={task.inputs_length}",
        f"--config.data.targets_length={task.max_new_tokens}",
        "--config.train.batch_size=4",
        "--config.train.steps=300",
    )
    config.finetune = ConfigDict(dict(long_docstring=task))
    return config
