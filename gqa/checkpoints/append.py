"""Appending to a large file past the page cache: no second copy of what is never read again, no wait at the end."""

import errno
import mmap
import os
from pathlib import Path

BLOCK_BYTES = 1 << 22  # written at a time
DIRECT_BYTES = 1 << 26  # expected size from which the cache is passed by
_ALIGNMENT = 4096  # of offsets, sizes and memory, for every disk


class AppendedFile:
    """A file that grows from `position` on. `written` says how much of it the file has for sure.

    Direct writes are of whole blocks, so in between the end waits in memory; where the file system has no direct
    writes, or the file will be small, `flush` writes all.
    """

    def __init__(self, path: Path, position: int, expected_bytes: int):
        self._path = path
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # aligned
        self._direct = None
        if expected_bytes >= DIRECT_BYTES and hasattr(os, "O_DIRECT"):
            self._direct = _open_direct(path)
        self._buffered = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.written = position - position % _ALIGNMENT if self._direct is not None else position
        self._waiting = position - self.written  # bytes of the block
        self._block[: self._waiting] = os.pread(self._buffered, self._waiting, self.written)

    def tell(self) -> int:
        """Size of the file once all is written."""
        return self.written + self._waiting

    def write(self, data: memoryview | bytes) -> None:
        """Appends `data`."""
        data = memoryview(data)
        while data:
            count = min(len(data), BLOCK_BYTES - self._waiting)
            self._block[self._waiting : self._waiting + count] = data[:count]
            self._waiting += count
            data = data[count:]
            if self._waiting == BLOCK_BYTES:
                self._write_block()

    def flush(self) -> None:
        """Writes what can be written now."""
        if self._direct is None and self._waiting:
            self._write_block()

    def close(self) -> None:
        """Writes the rest, and returns when all is on the disk."""
        try:
            if self._waiting:
                self._close_direct()
                self._write_block()
            os.fsync(self._buffered)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._close_direct()
        if self._buffered is not None:
            os.close(self._buffered)
            self._buffered = None

    def _write_block(self) -> None:
        block = memoryview(self._block)[: self._waiting]
        while block:
            try:
                count = os.pwrite(self._buffered if self._direct is None else self._direct, block, self.written)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct is None:
                    raise
                self._close_direct()  # a disk of larger alignment
                continue
            self.written += count
            block = block[count:]
        self._waiting = 0

    def _close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:  # no direct writes here
        return None
