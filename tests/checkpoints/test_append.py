import os

import numpy as np
import pytest

from gqa.checkpoints import append
from gqa.checkpoints.append import AppendedFile

BLOCK = 3 * 4096


@pytest.fixture(params=["direct", "through the cache", "no direct writes here"])
def kind(request, monkeypatch):
    monkeypatch.setattr(append, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(append, "DIRECT_BYTES", 1 << 40 if request.param == "through the cache" else 0)
    if request.param.startswith("no"):
        monkeypatch.setattr(append, "_open_direct", lambda path: None)
    return request.param


@pytest.mark.parametrize("sizes", [[1], [BLOCK], [BLOCK, 1], [5, BLOCK - 5, 4096], [7] * 3000, [10 * BLOCK + 13, 0, 2]])
@pytest.mark.parametrize("position", [0, 1, 4096, BLOCK + 17])
def test_the_file_holds_what_was_written(kind, sizes, position, tmp_path):
    data = np.random.default_rng(0).bytes(position + sum(sizes))
    path = tmp_path / "file"
    path.write_bytes(data[:position])
    file = AppendedFile(path, position, 0)
    done = position
    for size in sizes:
        file.write(data[done : done + size])
        done += size
        assert file.tell() == done
        file.flush()
        # As far as it says, a kill now would lose nothing.
        assert path.read_bytes()[: file.written] == data[: file.written]
        assert done - file.written < BLOCK if kind == "direct" else file.written == done
    file.close()
    assert path.read_bytes() == data


def test_abandoned_files_are_closed(kind, tmp_path):
    path = tmp_path / "file"
    path.touch()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    file = AppendedFile(path, 0, 0)
    file.write(b"x" * 5000)
    file.abandon()
    file.abandon()
    assert (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0) == before
