"""Check sums of files: computed in the background while they are read, compared with what lies beside them."""

import concurrent.futures
import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gqa.checkpoints.tensor import reading
from gqa.checkpoints.writer import SUMS
from gqa.errors import InputError

# File of sums, one `digest  name` a line -> algorithm: ours, and what Meta's downloads have.
KNOWN = {SUMS: "sha256", "checklist.chk": "md5"}


def read_sums(directory: Path) -> dict[str, tuple[str, str]]:
    """Name of a file in `directory` -> algorithm and digest that a file of sums gives it."""
    found = {}
    for file, algorithm in KNOWN.items():
        if (directory / file).is_file():
            for line in (directory / file).read_text(encoding="utf-8", errors="replace").splitlines():
                digest, _, name = line.partition(" ")
                found[name.strip().removeprefix("*")] = (algorithm, digest.lower())
    return found


def hash_files(
    directory: Path,
    files: Sequence[Path],
    expected: Mapping[str, tuple[str, str]],
    given_up: threading.Event | None = None,
) -> dict[str, str]:
    """SHA-256 by name relative to `directory`; raises `InputError` where a sum is not as `expected`.

    What is left is not read once `given_up` is set: the sums are incomplete then.
    """
    sums = {}
    for path in files:
        name = str(path.relative_to(directory)) if path.is_relative_to(directory) else path.name
        algorithm, wanted = expected.get(name, ("sha256", None))
        digests = {name: hashlib.new(name) for name in {"sha256", algorithm}}
        with reading(path) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as file:
            while chunk := file.read(1 << 22):
                if given_up is not None and given_up.is_set():
                    return sums
                for digest in digests.values():
                    digest.update(chunk)
        if wanted is not None and digests[algorithm].hexdigest() != wanted:
            found = digests[algorithm].hexdigest()
            raise InputError(f"{path} is damaged: its {algorithm} is {found[:16]}…; expected {wanted[:16]}…")
        sums[name] = digests["sha256"].hexdigest()
    return sums


@contextlib.contextmanager
def hashing_in_background(directory: Path, weight_files: Sequence[Path]) -> Iterator[concurrent.futures.Future]:
    """`hash_files` of the weights, and of what else is here of the files that `directory` has sums of.

    A process does not end before its threads do: what is not hashed when the block is left, by an error, is given up.
    """
    expected = read_sums(directory)
    others = [directory / name for name in expected if Path(name).name == name and (directory / name).is_file()]
    files = list(dict.fromkeys([*weight_files, *others]))
    executor = concurrent.futures.ThreadPoolExecutor(1)
    given_up = threading.Event()
    future = executor.submit(hash_files, directory, files, expected, given_up)
    executor.shutdown(wait=False)
    try:
        yield future
    finally:
        given_up.set()
