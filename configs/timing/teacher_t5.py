"""The shipped T5 teacher's shapes: batch 8, float32; input 2048 and 512 new tokens, as the paper has it.

The times of GQA's fig. 3 and Table 1 in miniature: with `--output=DIR/t5`, experiments.figures sets them beside the
scores of the sweeps' teacher t5. Minutes on two CPU cores.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The measurement."""
    folder = Path(__file__).parent
    config = ConfigDict(load_config(folder / "t5_xxl.py").to_dict())
    teacher = load_config(folder.parent / "teacher_t5.py").model
    config.size, config.changes = teacher.size, ConfigDict(teacher.changes.to_dict())
    config.kv_heads = (1, 2, 8)
    config.dtype = "float32"
    config.max_batch_size = 8
    config.num_drafted = 0
    return config
