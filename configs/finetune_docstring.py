"""Fine-tunes the shipped teacher, or a conversion of it, to write the first line of a Python function's docstring.

    python -m gqa.train --config=configs/finetune_docstring.py --workdir=runs/docstring

The recipe of `configs/finetune_t5.py` with what a laptop has room for: batches of 16 packed rows instead of 128, 256
tokens of each function instead of 512 (four of five functions are no longer), a fixed number of steps instead of
convergence, and for so few of them a learning rate of 0.006 instead of 0.001 (the teacher's pre-training ended at
0.013): after 100 steps it is where 0.001 is after 340. 34 minutes on two cores.
`python -m experiments.docstring_baseline` prints what it has to beat.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "finetune_t5.py").to_dict())
    config.model.update(checkpoint="assets/teacher", dtype="float32", scan_layers=False, remat="none")
    config.data.update(task="docstring", vocabulary="assets/vocabulary/python_4096.model", inputs_length=256)
    config.optimizer.learning_rate = 0.006
    config.train.update(steps=1000, batch_size=16, log_every=20, eval_every=100, eval_examples=256, save_every=100)
    return config
