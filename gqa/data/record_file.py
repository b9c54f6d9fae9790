"""A file of array records whose records are compressed beside the process that makes them."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from gqa.errors import InputError

OPTIONS = "group_size:1"  # a read by index decodes that record alone
_ALONE = 4096  # records from which a process is worth its start
_END = (2**32 - 1).to_bytes(4, "little")  # instead of a record's length: no more follow

# Compressing holds Python's lock, so another thread would not do. Without the end, the parent is gone.
_WRITE = """
import sys
from array_record.python.array_record_module import ArrayRecordWriter
writer, read = ArrayRecordWriter(sys.argv[1], sys.argv[2]), sys.stdin.buffer.read
while (size := read(4)) != bytes.fromhex("ffffffff"):
    if len(size) < 4:
        sys.exit("cut short")
    writer.write(read(int.from_bytes(size, "little")))
writer.close()
"""


def framed(record: bytes) -> bytes:
    """A record behind its length, as they follow on each other in a plain file."""
    return len(record).to_bytes(4, "little") + record


def read_framed(path: Path) -> Iterator[bytes]:
    """The records of a plain file of framed ones."""
    with path.open("rb") as file:
        while size := file.read(4):
            yield file.read(int.from_bytes(size, "little"))


class RecordWriter:
    """Writes array records to `path`: a file of many from a process of its own, with the same bytes.

    A context: a file whose context ends with an exception is cut short. Raises `InputError` where writing fails, as on
    a full disk.
    """

    def __init__(self, path: Path):
        self._path = path
        self._first: list[bytes] = []
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._close()
        elif self._process is not None:
            self._process.kill()
            self._process.communicate()

    def write(self, record: bytes) -> None:
        """Adds a record."""
        if self._process is not None:
            self._send(framed(record))
            return
        self._first.append(record)
        if len(self._first) > _ALONE:
            # A session of its own: Ctrl-C is the parent's to answer.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WRITE, str(self._path), OPTIONS],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=1 << 20,
                start_new_session=True,
            )
            for first in self._first:
                self.write(first)

    def _close(self) -> None:
        if self._process is None:
            try:
                with contextlib.closing(ArrayRecordWriter(str(self._path), OPTIONS)) as writer:
                    for record in self._first:
                        writer.write(record)
            except (RuntimeError, OSError) as error:
                raise InputError(f"{self._path} could not be written: {' '.join(str(error).split())}") from error
            return
        self._send(_END)
        self._finish()

    def _send(self, content: bytes) -> None:
        try:
            self._process.stdin.write(content)
        except BrokenPipeError:
            self._finish()
            raise

    def _finish(self) -> None:
        _, said = self._process.communicate()
        if self._process.wait():
            lines = said.decode("utf-8", "replace").strip().splitlines() or ["it was killed"]
            reason = lines[-1].removeprefix("RuntimeError: ")
            raise InputError(f"{self._path} could not be written: {reason}")
