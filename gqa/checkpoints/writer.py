"""Writing a checkpoint's folder: tensor by tensor, with sums, resumable, and there only when it is complete.

The folder grows as `.NAME.partial` beside its place and is renamed at the end. A journal in it says after every tensor
how far its file is good and the SHA-256 of the file up to there; an interrupted write goes on behind the last line that
still holds.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gqa.checkpoints.append import AppendedFile
from gqa.checkpoints.tensor import SAFETENSORS_DTYPES
from gqa.errors import InputError
from gqa.files import sync

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it
SHARD_BYTES = 5_000_000_000  # a larger model is written as several files with an index, as transformers does
AHEAD_BYTES = 1 << 29  # a tensor is read while the one before is written if together they are no larger
_CHUNK_BYTES = 1 << 22
_JOURNAL = "journal.jsonl"


class Entry(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]  # its values, of any float type and memory order

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def write(
    directory: Path,
    entries: Sequence[Entry],
    dtype: np.dtype,
    other_files: Callable[[Mapping[str, str]], Mapping[str, bytes | Path]],
    identity: Mapping | None,
) -> None:
    """Writes safetensors of `entries`, their index where there are several, other files and their sums.

    Args:
      directory: the new folder.
      entries: tensors in the order in which they are made and written.
      dtype: of the values written.
      other_files: from the SHA-256 of the files of weights by name: contents, or files to copy, by name.
      identity: what has to be the same for an interrupted write to be gone on with; `None`: it starts anew.

    Raises `InputError` when the folder exists, when another process is writing it and when the disk refuses; nothing
    is left behind then.
    """
    if directory.exists():
        raise InputError(f"{directory} exists already; name a new directory")
    partial = directory.with_name(f".{directory.name}.partial")
    total = sum(entry.size for entry in entries) * dtype.itemsize
    with _disk_errors(directory), _claimed(partial, identity) as journal:
        try:
            done = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
            free = shutil.disk_usage(partial).free
            if total - done > free:
                raise InputError(f"{directory} needs {total - done:,} bytes, the disk has {free:,} free")
            sums = _write_weights(partial, entries, dtype, journal, total)
            for name, content in other_files(sums).items():
                if isinstance(content, Path):
                    content = content.read_bytes()
                _write_file(partial / name, content)
                sums[name] = hashlib.sha256(content).hexdigest()
            lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
            _write_file(partial / SUMS, "".join(lines).encode())
            (partial / _JOURNAL).unlink()
            partial.rename(directory)
            sync(directory.parent)
        except BaseException as error:
            # An interrupted conversion is worth its bytes; whatever else went wrong would go wrong again.
            if identity is None or not isinstance(error, KeyboardInterrupt):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror or error}; nothing was left there") from error


@contextlib.contextmanager
def _claimed(partial: Path, identity: Mapping | None) -> Iterator[int]:
    """The open journal of `partial`, empty but for its first line if the folder is new or of another identity."""
    partial.mkdir(parents=True, exist_ok=True)
    journal = os.open(partial / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{partial} is being written by another process; wait for it") from None
        first = json.dumps(identity, sort_keys=True)
        found = _lines(journal)
        if identity is None or not found or json.dumps(found[0], sort_keys=True) != first:
            for path in partial.iterdir():
                if path.name != _JOURNAL:
                    path.unlink()
            os.ftruncate(journal, 0)
            os.write(journal, first.encode() + b"\n")
        yield journal
    finally:
        os.close(journal)


def _lines(journal: int) -> list:
    """The journal's lines up to the first that is damaged."""
    lines = []
    text = os.pread(journal, os.fstat(journal).st_size, 0)
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _write_weights(
    directory: Path, entries: Sequence[Entry], dtype: np.dtype, journal: int, total: int
) -> dict[str, str]:
    """Files of weights and their index; the SHA-256 of each by name."""
    shards = _shards(entries, dtype.itemsize)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    written = {(line["file"], line["tensor"]): line for line in _lines(journal)[1:]}
    sums = {}
    with (
        tqdm(total=total, desc="write", unit="B", unit_scale=True, delay=1) as bar,
        concurrent.futures.ThreadPoolExecutor(2) as threads,  # one reads, one hashes
    ):
        for name, shard in zip(names, shards, strict=True):
            sums[name] = _write_shard(directory / name, shard, dtype, journal, written, threads, bar)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        content = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        _write_file(directory / INDEX, content)
        sums[INDEX] = hashlib.sha256(content).hexdigest()
    return sums


def _shards(entries: Sequence[Entry], itemsize: int) -> list[list[Entry]]:
    """The entries of each file: at most `SHARD_BYTES`, or one tensor."""
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.size * itemsize > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size * itemsize
    return shards


def _write_shard(
    path: Path,
    entries: Sequence[Entry],
    dtype: np.dtype,
    journal: int,
    written: Mapping[tuple[str, str], dict],
    threads: concurrent.futures.Executor,
    bar: tqdm,
) -> str:
    """One file of weights, gone on with where it is good already; its SHA-256."""
    header = safetensors_header(entries, dtype)
    path.touch()
    with path.open("r+b") as file:
        digest, done = _good_part(file, header, path.name, entries, written)
        position = file.tell()
    file = AppendedFile(path, position, sum(entry.size for entry in entries) * dtype.itemsize)
    try:
        bar.update(max(position - len(header), 0))
        if not position:
            file.write(header)
            digest.update(header)

        def values(entry: Entry) -> np.ndarray:
            return np.asarray(entry.make().astype(dtype, order="C", copy=False)).reshape(entry.shape)

        waiting = list(entries[done:])
        ahead, lines = None, []
        for number, entry in enumerate(waiting):
            array = ahead.result() if ahead is not None else values(entry)
            following = waiting[number + 1] if number + 1 < len(waiting) else None
            ahead = None
            if following is not None and (entry.size + following.size) * 4 <= AHEAD_BYTES:
                ahead = threads.submit(values, following)
            raw = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            hashed = threads.submit(digest.update, raw)
            for start in range(0, len(raw), _CHUNK_BYTES):
                chunk = raw[start : start + _CHUNK_BYTES]
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            hashed.result()
            lines.append({"file": path.name, "tensor": entry.name, "size": file.tell(), "sha256": digest.hexdigest()})
            # Of what may still wait in memory the journal says nothing.
            good = [line for line in lines if line["size"] <= file.written]
            os.write(journal, "".join(json.dumps(line) + "\n" for line in good).encode())
            lines = lines[len(good) :]
            del array, raw
        file.close()
    finally:
        file.abandon()
    return digest.hexdigest()


def _good_part(file, header: bytes, name: str, entries: Sequence[Entry], written: Mapping) -> tuple:
    """Hash and number of tensors of the part of an unfinished file that the journal vouches for; the rest is cut."""
    digest, good, done = hashlib.sha256(), 0, 0
    size = os.fstat(file.fileno()).st_size
    if file.read(len(header)) == header:
        digest.update(header)
        kept = hashlib.sha256()
        for entry in entries:
            line = written.get((name, entry.name))
            if line is None or line["size"] > size:
                break
            while file.tell() < line["size"]:
                digest.update(file.read(min(_CHUNK_BYTES, line["size"] - file.tell())))
            if digest.hexdigest() != line["sha256"]:
                break
            good, done, kept = line["size"], done + 1, digest.copy()
        digest = kept
    if not done:
        digest = hashlib.sha256()
    file.truncate(good)
    file.seek(good)
    return digest, done


def safetensors_header(entries: Sequence[Entry], dtype: np.dtype) -> bytes:
    """The header of a safetensors file that holds `entries` one after the other."""
    theirs = next(name for name, ours in SAFETENSORS_DTYPES.items() if ours == dtype.name)
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files without this entry
    position = 0
    for entry in entries:
        end = position + entry.size * dtype.itemsize
        header[entry.name] = {"dtype": theirs, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
