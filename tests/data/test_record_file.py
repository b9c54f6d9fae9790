import subprocess
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from gqa.data import record_file
from gqa.data.record_file import OPTIONS, RecordWriter, framed, read_framed
from gqa.errors import InputError

RECORDS = [bytes([i % 251]) * (i % 97) + b"end" for i in range(3000)]


@pytest.mark.parametrize("alone", [0, 1000, 10_000])
def test_a_process_of_its_own_writes_the_same_bytes(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(record_file, "_ALONE", alone)
    writer = ArrayRecordWriter(str(tmp_path / "expected"), OPTIONS)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    with RecordWriter(tmp_path / "found") as writer:
        for record in RECORDS:
            writer.write(record)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_framed_records_are_read_again(tmp_path):
    (tmp_path / "file").write_bytes(b"".join(map(framed, [*RECORDS, b""])))
    assert list(read_framed(tmp_path / "file")) == [*RECORDS, b""]


def test_a_failure_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(record_file, "_ALONE", 0)
    popen, started = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(ValueError, match="mine"), RecordWriter(tmp_path / "file") as writer:
        writer.write(b"record")
        raise ValueError("mine")
    assert [process.poll() is None for process in started] == [False]


@pytest.mark.parametrize("alone", [0, 10_000])
def test_a_file_that_cannot_be_written_is_named(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(record_file, "_ALONE", alone)
    with pytest.raises(InputError) as caught, RecordWriter(Path("/dev/full")) as writer:
        for record in RECORDS:
            writer.write(record * 100)
    assert str(caught.value).startswith("/dev/full could not be written: write() failed: No space left on device")
    assert "\n" not in str(caught.value)


def test_what_the_process_dies_of_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(record_file, "_ALONE", 0)
    with (
        pytest.raises(InputError, match="file could not be written: "),
        RecordWriter(tmp_path / "no" / "file") as writer,
    ):
        for record in RECORDS:
            writer.write(record * 100)
    monkeypatch.setattr(record_file, "_WRITE", "raise SystemExit('no space left')")
    with (
        pytest.raises(InputError, match="file could not be written: no space left"),
        RecordWriter(tmp_path / "file") as w,
    ):
        for record in RECORDS:
            w.write(record * 1000)
