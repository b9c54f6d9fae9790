"""Files that Flax writes with msgpack: their tree of dictionaries and small values; arrays stay where they are.

Only what Flax writes is known: maps with distinct text keys, and its extension types. Nothing is built but plain
values, and nothing is read that is longer than the file.
"""

import dataclasses
import math
import struct
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401  names bfloat16 to numpy
import numpy as np

from gqa.checkpoints.tensor import DTYPES, Tensor, read_bytes, reading
from gqa.errors import InputError

ARRAY = 1  # extension type of Flax: an array as the msgpack of (shape, name of the type, values in C order)
CHUNKED = "__msgpack_chunked_array__"  # key of a map that Flax writes for an array of over 1 GiB
MAX_DEPTH = 100

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
# First byte -> what follows, and the bytes of its length.
_SIZED = {0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4)}
_SIZED |= {0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4)}
_SIZED |= {0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4)}
_SIZED |= {0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}


class Span(NamedTuple):
    """Bytes of the file that were not read: of an extension type, or plain bytes."""

    kind: int | None  # the extension type; None: plain bytes
    offset: int
    size: int


def read_tree(path: Path) -> dict[str, Any]:
    """The map in the file; `InputError` when it holds something else, ends early or does not end with it."""
    size = path.stat().st_size
    with reading(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        tree = _Reader(path, file, size).value(0)
        if file.tell() != size:
            raise InputError(f"{path} goes on for {size - file.tell()} bytes behind its msgpack; it is damaged")
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a msgpack {type(tree).__name__}; expected a map")
    return tree


def is_array(leaf: Any) -> bool:
    """Whether the value is an array, in one piece or in chunks."""
    return (isinstance(leaf, Span) and leaf.kind == ARRAY) or (isinstance(leaf, dict) and CHUNKED in leaf)


def open_array(path: Path, name: str, leaf: Any) -> Tensor:
    """The array `leaf` of the tree in `path`, not read yet; `InputError` when it does not describe itself."""
    if isinstance(leaf, Span):
        return _open_piece(path, name, leaf)
    shape = _numbered(leaf.get("shape"))
    pieces = [_open_piece(path, name, piece) for piece in _numbered(leaf.get("chunks")) or ()]
    dtypes = {piece.dtype for piece in pieces}
    if not _is_shape(shape) or len(dtypes) != 1 or sum(math.prod(p.shape) for p in pieces) != math.prod(shape):
        raise InputError(f"{path}: the chunks of {name} do not make an array of shape {shape}")

    def read() -> np.ndarray:
        array = np.empty(math.prod(shape), pieces[0].dtype)
        position = 0
        for piece in pieces:
            values = piece.read().reshape(-1)
            array[position : position + values.size] = values
            position += values.size
        return array.reshape(shape)

    return Tensor(name, path, tuple(shape), pieces[0].dtype, read)


def _open_piece(path: Path, name: str, span: Any) -> Tensor:
    if not isinstance(span, Span) or span.kind != ARRAY:
        raise InputError(f"{path}: a chunk of {name} is no array")
    with reading(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        end = span.offset + span.size
        file.seek(span.offset)
        content = _Reader(path, file, end).value(0)
        at_end = file.tell() == end
    if not at_end or not isinstance(content, list) or len(content) != 3 or not _is_shape(content[0]):
        raise InputError(f"{path}: {name} is no array of Flax: expected its shape, type and values")
    shape, dtype, values = content
    if str(dtype) not in {known.name for known in DTYPES}:
        names = ", ".join(sorted(known.name for known in DTYPES))
        raise InputError(f"{path}: {name} has type {dtype}; expected one of {names}")
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if not isinstance(values, Span) or values.kind is not None or values.size != nbytes:
        raise InputError(f"{path}: {name} does not have the {nbytes:,} bytes of {shape} of {dtype.name}")
    return Tensor(name, path, tuple(shape), dtype, partial(_read, path, values.offset, tuple(shape), dtype))


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return read_bytes(path, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _numbered(value: Any) -> list | None:
    """Flax's form of a tuple, a map with the keys "0", "1", …, as a list."""
    if not isinstance(value, dict) or list(value) != [str(i) for i in range(len(value))]:
        return None
    return list(value.values())


@dataclasses.dataclass(frozen=True)
class _Reader:
    path: Path
    file: BinaryIO
    end: int  # offset behind the last byte that may be read

    def value(self, depth: int) -> Any:
        """The value at the file's position, which moves behind it."""
        code = self.take(1)[0]
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 0x100
        if code <= 0x8F:
            return self.map(code & 0x0F, depth)
        if code <= 0x9F:
            return self.items(code & 0x0F, depth)
        if code <= 0xBF:
            return self.text(code & 0x1F)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return struct.unpack(_NUMBERS[code], self.take(struct.calcsize(_NUMBERS[code])))[0]
        if 0xD4 <= code <= 0xD8:
            return self.span(True, 1 << (code - 0xD4))
        if code not in _SIZED:
            raise self.damaged(f"an unknown code {code:#x}")
        what, width = _SIZED[code]
        size = int.from_bytes(self.take(width), "big")
        if what in ("bytes", "extension"):
            return self.span(what == "extension", size)
        if what == "text":
            return self.text(size)
        return self.items(size, depth) if what == "list" else self.map(size, depth)

    def take(self, size: int) -> bytes:
        if size > self.end - self.file.tell():
            raise InputError(f"{self.path} is damaged or cut short: a value lies behind byte {self.end}, its end")
        return self.file.read(size)

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.path} is damaged: its msgpack has {what} before byte {self.file.tell()}")

    def span(self, extension: bool, size: int) -> Span:
        kind = self.take(1)[0] if extension else None
        offset = self.file.tell()
        if size > self.end - offset:
            raise InputError(f"{self.path} is damaged or cut short: {size} bytes lie behind byte {self.end}, its end")
        self.file.seek(size, 1)
        return Span(kind, offset, size)

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise self.damaged("a text that is not UTF-8") from None

    def items(self, size: int, depth: int) -> list:
        if depth >= MAX_DEPTH:
            raise self.damaged(f"more than {MAX_DEPTH} levels")
        return [self.value(depth + 1) for _ in range(size)]

    def map(self, size: int, depth: int) -> dict[str, Any]:
        if depth >= MAX_DEPTH:
            raise self.damaged(f"more than {MAX_DEPTH} levels")
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise self.damaged("a key that is no text" if not isinstance(key, str) else f"the key {key!r} twice")
            found[key] = self.value(depth + 1)
        return found
