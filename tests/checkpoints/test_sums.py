"""Check sums that are computed in the background."""

import hashlib
import threading

import pytest

from gqa.checkpoints.sums import hashing_in_background
from gqa.errors import InputError


def test_what_an_error_leaves_unhashed_is_given_up(tmp_path):
    """A process does not end before its threads do, and a large checkpoint takes minutes."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: hours of zeros
    before = set(threading.enumerate())
    with pytest.raises(InputError, match="no room"), hashing_in_background(tmp_path, [path]) as sums:
        raise InputError("no room")
    assert sums.result(timeout=60) == {}
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_sums_are_compared_with_those_beside_the_files(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
    with hashing_in_background(tmp_path, [path]) as sums:
        assert sums.result() == {"model.safetensors": digest}
    path.write_bytes(b"abd")
    with hashing_in_background(tmp_path, [path]) as sums, pytest.raises(InputError, match="is damaged: its sha256 is"):
        sums.result()
