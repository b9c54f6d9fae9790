"""Text to train on: Python source that every installation carries, or a folder or file of the user's own.

| source | documents |
|---|---|
| `embedded` | the running Python's standard library: about 10 MB, and nothing to download |
| `embedded_large` | `embedded` and the source of the packages in `EMBEDDED_PACKAGES` that are installed: about 60 MB |
| a folder | its .txt, .md and .py files |
| a file | its blocks of about `BLOCK_CHARACTERS` characters, cut between lines, and longer lines between words |

About 5 % of the documents are held out, chosen by a hash of the document's name alone: a file is on the same side in
`embedded` and in `embedded_large`, and stays there when files come or go.
"""

import copy
import hashlib
import importlib.util
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gqa.errors import InputError

SPLITS = ("train", "heldout")
HELDOUT_FRACTION = 0.05
EMBEDDED_PACKAGES = tuple(
    "absl array_record etils flax fsspec grain jax jaxlib matplotlib ml_collections numpy optax orbax pygments rich "
    "scipy tensorboard treescope werkzeug yaml".split()
)
TEXT_SUFFIXES = (".txt", ".md", ".py")
BLOCK_CHARACTERS = 8192
_WORD_CHARACTERS = 256  # more than words have

# Larger source files are generated tables (MLIR bindings, code pages), of which a model learns nothing.
_MAX_EMBEDDED_BYTES = 256 * 1024
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "idle_test"}
)


@dataclass(frozen=True)
class Document:
    """One text: `name` is its path relative to the source with `/` between folders, `split` one of `SPLITS`."""

    name: str
    text: str
    split: str


def documents(source: str, split: str | None = None) -> Iterator[Document]:
    """Documents of `source` (of one split, or of both) in the order of their names.

    Files that are not UTF-8, empty ones and exact copies of an earlier one are left out, so no held-out text is also
    trained on. Raises `InputError` for a source that is neither embedded nor a path, and for one without documents in
    the train or the held-out split.
    """
    for document in Corpus(source).documents():
        if split in (None, document.split):
            yield document


def digest(source: str, split: str) -> str:
    """First 16 hex digits of the SHA-256 over (name, content) of every document of a split."""
    return Corpus(source).digest(split)


class Corpus:
    """What `source` holds, listed once; the texts are read again whenever they are asked for.

    `names(split)` are in sorted order (the embedded packages after the standard library); `read(name)` gives a
    document. Raises `InputError` as `documents` does.
    """

    def __init__(self, source: str):
        self.source = source
        self._single_file = source not in _EMBEDDED and Path(source).is_file()
        self._blocks: dict[str, str] = {}
        self._paths: dict[str, Path] = {}
        content_hashes: dict[str, str] = {}
        seen = set()
        for name, path, text in texts(source):
            if text is None:
                continue
            content_hash = hashlib.sha256(text.encode()).hexdigest()
            if not text.strip() or content_hash in seen:
                continue
            seen.add(content_hash)
            content_hashes[name] = content_hash
            if self._single_file:
                self._blocks[name] = text
            else:
                self._paths[name] = path
        self._splits = _assign_splits(content_hashes)
        self._digests = {
            split: _digest((name, content_hashes[name]) for name in self._splits if self._splits[name] == split)
            for split in SPLITS
        }
        for split in SPLITS:
            if not self.names(split):
                raise InputError(
                    f"source {source!r} has {len(content_hashes)} documents of text, none in the {split} split; "
                    f"expected a file or folder of {', '.join(TEXT_SUFFIXES)} with more text in it"
                )

    def names(self, split: str) -> list[str]:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {SPLITS}")
        return [name for name, its_split in self._splits.items() if its_split == split]

    def read(self, name: str) -> Document:
        text = self._blocks[name] if self._single_file else _read_text(self._paths[name])
        if text is None:
            raise InputError(f"{self._paths[name]} changed while it was being read")
        return Document(name, text, self._splits[name])

    def shuffled_names(self, split: str) -> list[str]:
        """The names of a split in an order that is random and always the same."""
        names = self.names(split)
        random.Random(0).shuffle(names)
        return names

    def shuffled(self, split: str) -> Iterator[str]:
        """The texts of a split in that order."""
        return (self.read(name).text for name in self.shuffled_names(split))

    def only(self, names: Iterable[str]) -> "Corpus":
        """A corpus that can read these documents, and knows of no others."""
        part, names = copy.copy(self), set(names)
        for kind in ("_blocks", "_paths", "_splits"):
            setattr(part, kind, {name: of for name, of in getattr(self, kind).items() if name in names})
        return part

    def documents(self) -> Iterator[Document]:
        return map(self.read, self._splits)

    def digest(self, split: str) -> str:
        return self._digests[split]


def texts(source: str) -> Iterator[tuple[str, Path, str | None]]:
    """Name, file and text of every document of a source, copies and blank ones too; `None`: it is not UTF-8.

    Raises `InputError` for a source that is neither embedded nor a path.
    """
    yield from read_files(files(source), is_file(source))


def files(source: str) -> list[tuple[str, Path]]:
    """Name and path of every file of a source. Errors as of `texts`."""
    return list(_files(source))


def is_file(source: str) -> bool:
    """Whether a source is one file, whose blocks are its documents."""
    return source not in _EMBEDDED and Path(source).is_file()


def read_files(found: Iterable[tuple[str, Path]], in_blocks: bool) -> Iterator[tuple[str, Path, str | None]]:
    """`texts` of some files of a source, each a document or cut into blocks."""
    for name, path in found:
        text = _read_text(path)
        if in_blocks and text is not None:
            for i, block in enumerate(_blocks(text)):
                yield f"{name}:{i}", path, block
        else:
            yield name, path, text


def count(source: str) -> int:
    """About how many documents a source has, from the names and sizes of its files. Errors as of `texts`."""
    if source not in _EMBEDDED and Path(source).is_file():
        return 1 + Path(source).stat().st_size // BLOCK_CHARACTERS
    return sum(1 for _ in _files(source))


def _standard_library() -> Iterator[tuple[str, Path]]:
    yield from _embedded_files(Path(sysconfig.get_path("stdlib")))


def _standard_library_and_packages() -> Iterator[tuple[str, Path]]:
    yield from _standard_library()
    for package in EMBEDDED_PACKAGES:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        for folder in (spec and spec.submodule_search_locations) or ():
            for name, path in _embedded_files(Path(folder)):
                yield f"{package}/{name}", path


_EMBEDDED = {"embedded": _standard_library, "embedded_large": _standard_library_and_packages}


def _files(source: str) -> Iterable[tuple[str, Path]]:
    if source in _EMBEDDED:
        return _EMBEDDED[source]()
    path = Path(source)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        return _walk(path, TEXT_SUFFIXES, frozenset())
    raise InputError(f"source {source!r} not found; expected {', '.join(_EMBEDDED)} or a path to a folder or file")


def _walk(root: Path, suffixes: tuple[str, ...], skipped_folders: frozenset[str]) -> Iterator[tuple[str, Path]]:
    found = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped_folders]
        for file in files:
            path = Path(folder, file)
            if path.suffix in suffixes:
                found[path.relative_to(root).as_posix()] = path
    return ((name, found[name]) for name in sorted(found))


def _embedded_files(root: Path) -> Iterator[tuple[str, Path]]:
    for name, path in _walk(root, (".py",), _SKIPPED_FOLDERS):
        if not name.endswith("_pb2.py") and path.stat().st_size <= _MAX_EMBEDDED_BYTES:
            yield name, path


def _read_text(path: Path) -> str | None:
    """The file's text with `\\n` between lines, or None where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None


def _blocks(text: str) -> Iterator[str]:
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        for part in _cut(line):
            lines.append(part)
            size += len(part)
            if size >= BLOCK_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _cut(line: str) -> Iterator[str]:
    """Parts of `BLOCK_CHARACTERS`, and what is left of the word there, unless it is longer than any word."""
    start = 0
    while len(line) - start > BLOCK_CHARACTERS:
        end = start + BLOCK_CHARACTERS
        end = line.find(" ", end - 1, end + _WORD_CHARACTERS) + 1 or end
        yield line[start:end]
        start = end
    yield line[start:]


def _assign_splits(names: Iterable[str]) -> dict[str, str]:
    fractions = {name: int(hashlib.sha256(_bytes(name)).hexdigest()[:8], 16) / 16**8 for name in names}
    # A handful of files may have none under 5 %: then the lowest is held out.
    threshold = max(HELDOUT_FRACTION, min(fractions.values(), default=0.0) + 16**-8)
    return {name: "heldout" if fraction < threshold else "train" for name, fraction in fractions.items()}


def _digest(pairs: Iterable[tuple[str, str]]) -> str:
    total = hashlib.sha256()
    for name, content_hash in pairs:
        total.update(_bytes(f"{name}\0{content_hash}\n"))
    return total.hexdigest()[:16]


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # a file's name may be any bytes
