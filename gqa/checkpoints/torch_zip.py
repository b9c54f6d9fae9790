"""The zip archives that `torch.save` writes: entries stored as they are, under one folder, read where they lie.

Format: PKWARE's APPNOTE 4.3; what torch makes of it: caffe2/serialize/inline_container.cc. The directory at the end is
compared with each entry's own header.
"""

import dataclasses
import stat
import struct
import zlib
from pathlib import Path

import numpy as np

from gqa.checkpoints.tensor import read_bytes
from gqa.errors import InputError

MAX_DIRECTORY_BYTES = 1 << 24  # some 200,000 entries
CHUNK_BYTES = 1 << 24
RESAVE = "load it with a current PyTorch and save it again with torch.save, or as safetensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of the archive."""

    name: str
    header: int  # where its own header begins in the file
    offset: int  # where its bytes begin
    size: int
    crc: int  # CRC-32 of its bytes


def entries(path: Path) -> dict[str, Entry]:
    """The archive's entries by name within its folder, from headers alone.

    Raises `InputError` for other files and for entries that are compressed, set twice or overlap.
    """
    start, size, count = _directory(path)
    found = _listed(path, read_bytes(path, start, size).tobytes(), start)
    names, folders, used = {}, set(), 0
    for entry in sorted(found, key=lambda entry: entry.header):
        if entry.header < used:
            raise InputError(f"{path}: the zip entry {short(entry.name)} overlaps another")
        used = entry.offset + entry.size
        folder, _, name = entry.name.partition("/")
        if name in names:
            raise InputError(f"{path} has the zip entry {short(name)} twice")
        names[name] = entry
        folders.add(folder)
    if len(found) != count or len(folders) > 1:
        raise InputError(f"{path} has {len(found)} zip entries in {len(folders)} folders; expected {count} in one")
    return names


def contents(path: Path, entry: Entry, limit: int) -> bytes:
    """All bytes of an entry of at most `limit`, checked."""
    if entry.size > limit:
        raise InputError(f"{path}: {short(entry.name)} has {entry.size} bytes; expected at most {limit}")
    return read_part(path, entry, 0, entry.size, set()).tobytes()


def read_part(path: Path, entry: Entry, begin: int, size: int, verified: set[str]) -> np.ndarray:
    """Bytes of an entry, after its CRC-32 is found right; for a part, all of it is read once, as `verified` notes."""
    crc = 0
    if size < entry.size and entry.name not in verified:
        for position in range(0, entry.size, CHUNK_BYTES):
            chunk = read_bytes(path, entry.offset + position, min(CHUNK_BYTES, entry.size - position))
            crc = zlib.crc32(chunk, crc)
    found = read_bytes(path, entry.offset + begin, size)
    if size == entry.size:
        crc = zlib.crc32(found)
    elif entry.name in verified:
        return found
    if crc != entry.crc:
        expected = f"{crc:08x}, expected {entry.crc:08x}"
        raise InputError(f"{path} is damaged: {short(entry.name)} has CRC-32 {expected}")
    verified.add(entry.name)
    return found


def short(value: object) -> str:
    """A name or number out of a file, for a message of one line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _directory(path: Path) -> tuple[int, int, int]:
    """Where the directory begins, its bytes and its number of entries."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file")
    size = status.st_size
    head = read_bytes(path, 0, min(size, 512)).tobytes()
    if head[:1] == b"\x80" or head[257:262] == b"ustar":
        raise InputError(f"{path} is in the format of PyTorch before 1.6; {RESAVE}")
    if head[:4] != b"PK\3\4" or size < 52:
        raise InputError(f"{path} is no file of torch.save: it is no zip archive but begins with {head[:4]!r}")
    # What torch writes has no comment, so that the directory's own record is the end of the file.
    signature, _, _, _, count, length, start, comment = _record(path, "4s4H2IH", size - 22)
    end, good = size - 22, signature == b"PK\5\6" and not comment
    if (locator := _record(path, "4sIQI", size - 42))[0] == b"PK\6\7":
        end = min(locator[2], size)
        if good := good and end + 56 <= size - 42:
            signature, *_, count, length, start = _record(path, "4sQ2H2I4Q", end)
            good = signature == b"PK\6\6"
    if not good or start + length != end or length > MAX_DIRECTORY_BYTES:
        raise InputError(f"{path} does not end with the directory of a zip archive; it is damaged or cut short")
    return start, length, count


def _listed(path: Path, directory: bytes, limit: int) -> list[Entry]:
    """The entries of the directory, each compared with its own header before `limit`."""
    found, position = [], 0
    while position < len(directory):
        fields = struct.unpack_from("<4s6H3I5H2I", directory.ljust(position + 46, b"\0"), position)
        flags, method, crc, packed, size, header = *fields[3:5], *fields[7:10], fields[16]
        name_begin, name_end = position + 46, position + 46 + fields[10]
        position = name_end + fields[11] + fields[12]
        if fields[0] != b"PK\1\2" or position > len(directory):
            raise InputError(f"{path} has a damaged zip directory")
        raw_name = directory[name_begin:name_end]
        name = raw_name.decode("utf-8", "replace")
        size, packed, header = _wide(directory[name_end : name_end + fields[11]], size, packed, header)
        if method or flags & 1 or packed != size:
            raise InputError(f"{path}: the zip entry {short(name)} is compressed or encrypted; {RESAVE}")
        offset = limit  # outside, unless its own header says otherwise
        if header + 30 + len(raw_name) <= limit:
            own = _record(path, "4s5H3I2H", header)
            if own[0] == b"PK\3\4" and not own[3] and own[9] == len(raw_name):
                offset = header + 30 + own[9] + own[10]
        if offset + size > limit or read_bytes(path, header + 30, len(raw_name)).tobytes() != raw_name:
            raise InputError(f"{path}: the zip entry {short(name)} is not where the directory says")
        found.append(Entry(name, header, offset, size, crc))
    return found


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values, those that do not fit in 32 bits taken from the extra field 1; too large where it lacks them."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            field = extra[4 : 4 + size]
            wide = list(struct.unpack_from(f"<{len(field) // 8}Q", field))
        extra = extra[4 + size :]
    numbers = iter(wide)
    return [next(numbers, 2**63) if value == 0xFFFFFFFF else value for value in values]


def _record(path: Path, layout: str, offset: int) -> tuple:
    return struct.unpack("<" + layout, read_bytes(path, offset, struct.calcsize("<" + layout)))
