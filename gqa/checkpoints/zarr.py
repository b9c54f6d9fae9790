"""Arrays in zarr folders (format 2), as TensorStore writes them: headers read by us, values by TensorStore.

A folder has a `.zarray` with shape and types and one file per chunk. For zarr a chunk that is not there is full of a
default value; a weight has none, so that here it is an error.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gqa.checkpoints.tensor import Tensor, read_bytes, unique_keys
from gqa.errors import InputError

HEADER = ".zarray"
MAX_HEADER_BYTES = 1 << 20
ZARR_DTYPES = {
    "<f8": np.dtype(np.float64),
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Compressor -> bytes that one byte can stand for at most: deflate's 258 bytes in 2 bits, Zstandard's 128 KiB in 4
# bytes. A chunk said to have more is none, whatever a header claims.
COMPRESSORS = {None: 1, "gzip": 1032, "zlib": 1032, "zstd": 1 << 15}
STEP_BYTES = 1 << 26  # read at once, so that the chunks being decoded do not add up to another copy of the tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZarrTensor(Tensor):
    """A tensor in a zarr folder."""

    chunks: tuple[int, ...]  # shape of a chunk
    files: tuple[Path, ...]  # all that the tensor is made of

    def read_part(self, columns: slice) -> np.ndarray:
        """Its values at `columns` of the second axis; `InputError` for chunks that cannot be decoded."""
        return _read(self.name, self.file, self.shape, self.chunks, columns)


def open_zarr(name: str, folder: Path, root: Path, spec: Mapping[str, Any]) -> ZarrTensor:
    """The tensor `name` in `folder`, its values not read yet.

    Args:
      name: for messages.
      folder: of its `.zarray` and chunks.
      root: the checkpoint's folder, which no link may leave.
      spec: TensorStore's, of the same tensor; where it states the shape and the type, they are compared.

    Raises `InputError` for a folder that is missing or outside of `root`, for a header that is damaged or at odds with
    `spec`, and for chunks that are missing or too small for their shape.
    """
    if not folder.is_dir():
        raise InputError(f"{name} lies in {folder.name} by its name, which {root} does not have")
    check_inside(folder, root)
    header = _header(folder / HEADER, root)
    shape, chunks = header["shape"], header["chunks"]
    if not _sizes(shape) or not _sizes(chunks) or len(shape) != len(chunks):
        raise InputError(f"{folder / HEADER}: shape and chunks are no lists of sizes for the same axes")
    if any(chunk > size for size, chunk in zip(shape, chunks, strict=True)):  # a chunk is decoded as a whole
        raise InputError(f"{folder / HEADER}: chunks={chunks} are larger than the shape; expected at most {shape}")
    if str(header.get("dtype")) not in ZARR_DTYPES:  # structured types are lists
        raise InputError(f"{folder / HEADER}: {name} has type {header.get('dtype')}; expected {', '.join(ZARR_DTYPES)}")
    dtype = ZARR_DTYPES[header["dtype"]]
    metadata = spec.get("metadata")
    stated = metadata.get("shape", shape) if isinstance(metadata, dict) else shape
    if stated != shape or spec.get("dtype", dtype.name) != dtype.name:
        raise InputError(
            f"{folder / HEADER}: {name} is {shape} of {dtype.name}; the checkpoint says {stated} of {spec.get('dtype')}"
        )
    files = _chunk_files(name, folder, root, header, dtype.itemsize)
    read = functools.partial(_read, name, folder, tuple(shape), tuple(chunks), None)
    return ZarrTensor(name, folder, tuple(shape), dtype, read, chunks=tuple(chunks), files=(folder / HEADER, *files))


def _header(path: Path, root: Path) -> dict[str, Any]:
    """The JSON object in a `.zarray`, with values that we know how to read."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    check_inside(path, root)
    size = path.stat().st_size
    if size > MAX_HEADER_BYTES:
        raise InputError(f"{path} has {size:,} bytes; expected at most {MAX_HEADER_BYTES:,}")
    try:
        text = read_bytes(path, 0, size).tobytes().decode()
        header = json.loads(text, object_pairs_hook=functools.partial(unique_keys, path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(header, dict) or not {"shape", "chunks", "dtype"} <= header.keys():
        raise InputError(f"{path} is no header of zarr: it has no shape, chunks and dtype")
    compressor = header.get("compressor")
    header["compressor"] = compressor.get("id") if isinstance(compressor, dict) else compressor
    for key, expected in (
        ("zarr_format", (2,)),
        ("compressor", tuple(COMPRESSORS)),
        ("filters", (None,)),
        ("order", ("C", "F")),
        ("dimension_separator", (".", "/")),
    ):
        default = "." if key == "dimension_separator" else None
        if header.setdefault(key, default) not in expected:
            raise InputError(
                f"{path}: {key}={header[key]!r} is not supported; expected {' or '.join(map(str, expected))}"
            )
    return header


def _chunk_files(name: str, folder: Path, root: Path, header: Mapping[str, Any], itemsize: int) -> list[Path]:
    """The file of every chunk, each there and large enough."""
    separator, found = header["dimension_separator"], {}
    for parent, folders, names in os.walk(folder):
        for inner in folders:
            check_inside(Path(parent, inner), root)
        found |= {
            os.path.relpath(path, folder).replace(os.sep, separator): path for path in (Path(parent, n) for n in names)
        }
    grid = [-(-size // chunk) for size, chunk in zip(header["shape"], header["chunks"], strict=True)]
    expected, files = math.prod(grid), []
    if expected > len(found) + 10_000:  # more than anyone would want listed
        raise InputError(f"{name} has {expected:,} chunks by {folder / HEADER}; the folder has {len(found):,} files")
    nbytes = math.prod(header["chunks"]) * itemsize
    for index in itertools.product(*map(range, grid)):
        key = separator.join(map(str, index)) or "0"
        path = found.get(key)
        if path is None or not path.is_file():
            raise InputError(f"{name} lacks its chunk {key} in {folder}")
        check_inside(path, root)
        size, densest = path.stat().st_size, COMPRESSORS[header["compressor"]]
        if nbytes > size * densest or (header["compressor"] is None and nbytes != size):
            raise InputError(f"{path} has {size:,} bytes; a chunk of {name} is {nbytes:,} ({header['compressor']})")
        files.append(path)
    return files


def check_inside(path: Path, root: Path) -> None:
    """Raises `InputError` where `path` is a link that leads out of the checkpoint's folder `root`."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} is a link out of the checkpoint's folder; copy what it points to there")


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size > 0 for size in value)


def _read(
    name: str, folder: Path, shape: tuple[int, ...], chunks: tuple[int, ...], columns: slice | None
) -> np.ndarray:
    import tensorstore  # 0.2 s, and only these checkpoints need it

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder.absolute())},
        "fill_missing_data_reads": False,
    }
    try:
        store = tensorstore.open(spec, open=True, context=_context()).result()
        if store.shape != shape:
            raise ValueError(f"its shape has become {store.shape}")
        if columns is not None:
            store = store[:, columns.start : columns.stop].translate_to[0]
        if not store.rank:
            return store.read().result()
        array = np.empty(store.shape, store.dtype.numpy_dtype)
        step = max(STEP_BYTES // (array[0].nbytes * chunks[0]), 1) * chunks[0]
        for first in range(0, len(array), step):
            last = min(first + step, len(array))
            array[first:last] = store[first:last].read().result()
        return array
    except (ValueError, LookupError, RuntimeError, OSError) as error:  # by TensorStore's status codes
        what = " ".join(re.split(r" \[(?:tensorstore_spec|source locations)=", str(error))[0].split())
        raise InputError(f"{name} cannot be read from {folder}: {what}") from error


@functools.cache
def _context():
    import tensorstore

    return tensorstore.Context({"data_copy_concurrency": {"limit": 4}, "file_io_concurrency": {"limit": 4}})
