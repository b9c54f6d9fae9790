"""A tensor of a checkpoint that has not been read, and reading it: `pread` into an array of its own, never a map.

Mapped pages count as resident memory, and a map of a file that shrinks kills the process.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from gqa.errors import InputError

# The types of weights that we read; everything is computed in float32 or kept in bfloat16.
DTYPES = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, not read yet."""

    name: str  # as its file calls it
    file: Path  # where it is, for messages
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # reads it now, of `shape` and `dtype`; raises `InputError` for damaged data
    checksum: int | None = None  # CRC-32 of its values, where its file says that

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same values; where their files have check sums, these alone are compared."""
    if left.shape != right.shape:
        return False
    if left.dtype == right.dtype and None not in (left.checksum, right.checksum):
        return left.checksum == right.checksum
    return np.array_equal(left.read(), right.read())


def read_bytes(path: Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes of a file from `offset`, as uint8; raises `InputError` when the file ends before."""
    buffer = np.empty(size, np.uint8)
    with reading(path) as descriptor:
        done = 0
        while done < size:
            count = os.preadv(descriptor, [memoryview(buffer)[done:]], offset + done)
            if not count:
                raise InputError(f"{path} ends after {offset + done} bytes; expected {offset + size}")
            done += count
    return buffer


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """A file's descriptor; what the system says against reading it becomes an `InputError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; reads its header only.

    Raises `InputError` unless the header describes the file to the byte: no overlap, no gap, no name twice.
    """
    size = path.stat().st_size
    if size < 8:
        raise InputError(f"{path} has {size} bytes; expected a safetensors file")
    length = int(read_bytes(path, 0, 8).view("<u8")[0])
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(f"{path} says its header has {length} bytes, the file has {size}; it is damaged or cut short")
    try:
        header = json.loads(
            read_bytes(path, 8, length).tobytes().decode(), object_pairs_hook=partial(unique_keys, path)
        )
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError of its own
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} has a damaged header: it is no object")
    header.pop("__metadata__", None)
    tensors, spans, start = {}, [], 8 + length
    for name, entry in header.items():
        dtype, shape, (begin, end) = _checked(path, name, entry)
        spans.append((begin, end, name))
        if not 0 <= begin <= end <= size - start:
            raise InputError(f"{path}: {name} lies at bytes {begin} to {end} of {size - start}; the file is cut short")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{path}: {name} has {end - begin} bytes; expected {list(shape)} of {dtype.name}")
        read = partial(_read, path, start + begin, shape, dtype)
        tensors[name] = Tensor(name, path, shape, dtype, read)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise InputError(
                f"{path}: {name} begins at byte {begin}; expected {position}, where the tensor before ends"
            )
        position = end
    if position != size - start:
        raise InputError(f"{path} has {size - start} bytes of tensors; expected {position} by its header")
    return tensors


def _checked(path: Path, name: str, entry) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    def integers(value, count: int | None) -> bool:
        good = isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
        return good and count in (None, len(value))

    if not isinstance(entry, dict) or not integers(entry.get("shape"), None):
        raise InputError(f"{path}: the header's entry of {name} has no shape")
    if not integers(entry.get("data_offsets"), 2):
        raise InputError(f"{path}: the header's entry of {name} has no pair of data_offsets")
    if str(entry.get("dtype")) not in SAFETENSORS_DTYPES:  # JSON's lists have no hash
        expected = ", ".join(SAFETENSORS_DTYPES)
        raise InputError(f"{path}: {name} has type {entry.get('dtype')}; expected one of {expected}")
    return np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"]), tuple(entry["data_offsets"])


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return read_bytes(path, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def unique_keys(path: Path, pairs: list[tuple]) -> dict:
    """For `json.loads`: the object, or `InputError` where a key is set twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: {twice} is set twice")
    return found
