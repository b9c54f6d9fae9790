"""Conversions that are killed while they write, or whose disk is full; each in a process of its own."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from gqa import models
from gqa.checkpoints import hf, writer

ARGUMENTS = ("--output=converted", "--kv_heads=2", "--method=mean")

# The command, in a folder, whose files cannot grow beyond a limit: what the system does then is an argument.
LIMITED = """
import os, resource, signal, sys
from checkpoints_tools import convert
from gqa.command_line import run

folder, limit, action = sys.argv[1:4]
sys.argv[:4] = ["convert.py"]
os.chdir(folder)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
signal.signal(signal.SIGXFSZ, getattr(signal, action))
run(convert.main)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory, random_model):
    """A T5 of 800 KB."""
    folder = tmp_path_factory.mktemp("checkpoints") / "t5"
    hf.save(random_model(models.size("t5_1_1_mini")), folder, dtype="float32")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_in_the_middle_of_a_tensor_it_goes_on(source, tmp_path, run_python, call, monkeypatch):
    """Twice, and then the end, all files of which are those of a conversion that nothing disturbed."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    partial = tmp_path / "killed" / ".converted.partial"
    for limit in (300_001, 600_001):
        process = run_python("-c", LIMITED, tmp_path / "killed", limit, "SIG_DFL", f"--source={source}", *ARGUMENTS)
        assert process.returncode == -signal.SIGXFSZ, process.stderr
        assert os.listdir(tmp_path / "killed") == [partial.name]
        assert (partial / "model.safetensors").stat().st_size == limit
    monkeypatch.chdir(tmp_path / "whole")
    assert call("convert", f"--source={source}", *ARGUMENTS) == 0
    monkeypatch.chdir(tmp_path / "killed")
    assert call("convert", f"--source={source}", *ARGUMENTS) == 0
    assert os.listdir() == ["converted"]
    assert contents(tmp_path / "killed" / "converted") == contents(tmp_path / "whole" / "converted")


def test_a_disk_that_fills_up(source, tmp_path, run_python):
    before = contents(source)
    process = run_python("-c", LIMITED, tmp_path, 300_001, "SIG_IGN", f"--source={source}", *ARGUMENTS)
    assert process.returncode == 2
    assert process.stderr == "error: converted cannot be written: File too large; nothing was left there\n"
    assert os.listdir(tmp_path) == []
    assert contents(source) == before


def test_a_disk_with_too_little_room(source, tmp_path, call, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert call("convert", f"--source={source}", f"--output={tmp_path / 'out'}", *ARGUMENTS[1:]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} needs 757,760 bytes, the disk has 1,000 free\n"
    assert os.listdir(tmp_path) == []
