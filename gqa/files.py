"""Files that are there when they are complete."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, to write a file to; in the end it takes its place.

    After an error nothing is left; what a killed process left is overwritten. `shared`: several processes may write
    at once, each beside the others, and the last one's stays.
    """
    unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(4) if shared else 'unfinished'}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the file, or the names in the folder, at `path` are on the disk: a power failure keeps them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Writes a text in UTF-8 as `whole`; surrogates, which UTF-8 has none of, become question marks."""
    with whole(path, shared=shared) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="replace", newline="")


def write_json(path: Path, content: Any, *, shared: bool = False) -> None:
    """Writes a JSON file as `whole`."""
    write_text(path, json.dumps(content, indent=2) + "\n", shared=shared)
