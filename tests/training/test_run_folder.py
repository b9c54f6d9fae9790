"""Who writes in a run's folder."""

import os
import signal
import subprocess
import sys

import pytest

from gqa.errors import InputError
from gqa.training.run_folder import locked

HOLDER = """
import sys
from pathlib import Path
from gqa.training.run_folder import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_run(tmp_path):
    with locked(tmp_path):
        with pytest.raises(InputError) as caught, locked(tmp_path):
            pass
        assert str(caught.value) == (
            f"workdir {tmp_path} is in use by a living run (process {os.getpid()} on {os.uname().nodename}); "
            "wait for it, stop it, or choose another folder"
        )
    with locked(tmp_path):
        pass


def test_a_killed_run_has_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on "), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock").read_text().startswith(f"process {holder.pid} ")
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
