"""What a format of checkpoints hands over, and what all formats check alike."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gqa import models
from gqa.checkpoints.table import Row, Transform
from gqa.checkpoints.tensor import Tensor
from gqa.errors import InputError


class Contents(NamedTuple):
    """What a format found in a folder, from headers alone."""

    config: models.ModelConfig
    tensors: dict[str, tuple[Tensor, Transform]]  # path of our parameter, by layer -> where it comes from
    weight_files: list[Path]  # all files whose bytes make the weights
    token_ids: dict[str, int | list[int]] | None  # as in a Hugging Face config.json; None: the family's usual ones


def match(
    directory: Path, table: Mapping[str, Row], tensors: Mapping[str, Tensor], ignored: Callable[[str], bool]
) -> dict[str, tuple[Tensor, Transform]]:
    """Path of our parameter -> its tensor and transform; `InputError` for tensors that are missing or unknown."""
    missing = sorted(table.keys() - tensors.keys())
    unknown = sorted(name for name in tensors.keys() - table.keys() if not ignored(name))
    for what, wrong in (("lacks", missing), ("has unknown", unknown)):
        if wrong:
            raise InputError(f"{directory} {what} {len(wrong)} tensor(s) for its sizes: {some(wrong)}")
    return {row.path: (tensors[name], row.transform) for name, row in table.items()}


def some(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
