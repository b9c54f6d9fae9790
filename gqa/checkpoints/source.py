"""What a format of checkpoints hands over, and what all formats check alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gqa import models
from gqa.checkpoints.hf_config import read_json
from gqa.checkpoints.table import Row, Transform
from gqa.checkpoints.tensor import Tensor
from gqa.errors import InputError


class Contents(NamedTuple):
    """What a format found in a folder, from headers alone."""

    config: models.ModelConfig
    tensors: dict[str, tuple[Tensor, Transform]]  # path of our parameter, by layer -> where it comes from
    weight_files: list[Path]  # all files whose bytes make the weights
    token_ids: dict[str, int | list[int]] | None  # as in a Hugging Face config.json; None: the family's usual ones
    # Files that a copy of the checkpoint takes along; None: those of `COMPANIONS` in the folder itself.
    companions: list[Path] | None = None


GENERATION_CONFIG = "generation_config.json"
# Everything that tokenizers of these families are saved as, and how to generate.
COMPANIONS = ("*.model", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
COMPANIONS += ("chat_template.jinja", GENERATION_CONFIG, "reward_head.safetensors")


def companions(directory: Path) -> list[Path]:
    """The files of a folder that are of `COMPANIONS`."""
    return sorted({file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()})


def identity(files: Iterable[Path]) -> dict[str, list[int]]:
    """What tells whether files are still the same."""
    stats = {str(file.absolute()): file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def special_ids(checkpoint: Path, contents: Contents) -> dict[str, list[int]]:
    """Special tokens by name: those of `generation_config.json` where there is one, else of `config.json`.

    Raises `InputError` for what is no token id.
    """
    raw: Mapping[str, Any] = contents.token_ids or {}
    for file in contents.companions:
        if file.name == GENERATION_CONFIG:
            raw = dict(raw) | {name: value for name, value in read_json(file).items() if value is not None}
    found = {}
    for name in ("bos_token_id", "eos_token_id"):
        if name in raw:
            ids = raw[name] if isinstance(raw[name], list) else [raw[name]]
            if not ids or not all(type(token) is int and token >= 0 for token in ids):
                raise InputError(f"{checkpoint}: {name}={raw[name]!r}; expected a token id or a list of them")
            found[name] = ids
    return found


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
