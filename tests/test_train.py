"""`python -m gqa.train` on bad input: one line, exit code 2, and nothing on disk that was not there before."""

import json
import os
import shutil
import signal
import sys

import jax
import pytest

from gqa import command_line, models, train
from gqa.checkpoints import hf
from gqa.data import tokenise
from gqa.data.prepare import record_path
from gqa.training import run_folder

MEND = "delete the folder and prepare it again"


@pytest.fixture
def error_of(config_file, monkeypatch, capsys, tmp_path):
    """A function (family, overrides of the file, arguments) -> the error line; nothing may change below tmp_path."""
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))

    def call(family, overrides=None, *arguments, workdir=tmp_path / "run", config=None):
        config = config or config_file(family, overrides)
        monkeypatch.setattr(sys, "argv", ["train.py", f"--config={config}", f"--workdir={workdir}", *arguments])
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            command_line.run(train.main)
        assert stopped.value.code == 2
        assert contents(tmp_path) == before
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return call


def contents(folder):
    """Every path below `folder`, with the bytes of the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def checkpoint(tiny_run, tmp_path_factory):
    """A saved T5."""
    folder = tmp_path_factory.mktemp("checkpoints") / "t5"
    hf.save(models.create(tiny_run("t5").model.architecture(), jax.random.key(0)), folder, dtype="float32")
    return folder


def from_checkpoint(folder) -> dict:
    return {"model.size": None, "model.changes": {}, "model.checkpoint": str(folder)}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.stpes=5", "unknown key config.train.stpes; nearest: config.train.steps"),
        ("--profile=3", "--profile=3; expected START:STEPS, such as 10:3 for steps 10, 11 and 12"),
        ("--profile=20:2", "--profile=20:2 is not of the run's steps; expected some of 1..20"),
        ("--config.train.steps=many", "config.train.steps=many has the wrong type; expected int such as 20"),
        ("--config.model.scan_layers=2", "config.model.scan_layers=2 has the wrong type; expected bool such as True"),
        ("--wrokdir=x", "unknown option --wrokdir; nearest: --workdir"),
        (
            "--config.model.changes.cross_kv_heads=3",
            "cross_kv_heads=3 does not divide num_heads=8; nearest: 2, 4",
        ),
        ("--config.train.accumulation=3", "train.accumulation=3 does not divide train.batch_size=8; nearest: 2"),
        (
            "--config.mesh.fsdp=3",
            "mesh data=-1 x fsdp=3 x tensor=1 does not fit 1 device(s): 3 does not divide it; nearest: 1",
        ),
        ("--config.train.seed=-1", "seed=-1; expected 0..4294967295"),
        (
            "--config.optimizer.decay_rate=2",
            "optimizer.decay_rate=2.0; expected a number in (0, 1]; nearest: 0.8 or 1.0",
        ),
        ("--config.model.size=t5_small", None),
        (
            "--config.records=nowhere",
            "nowhere has no manifest.json; expected a folder that python -m gqa.data.prepare wrote",
        ),
        ("--config.data.vocabulary=no.model", "vocabulary no.model not found; expected a SentencePiece .model file"),
    ],
)
def test_a_bad_argument(error_of, argument, message):
    found = error_of("t5", None, argument)
    assert found == message or (
        message is None and found.startswith("no model size 't5_small'; expected one of t5_1_1_")
    )


def test_a_wrong_path_of_the_config(error_of, config_file):
    path = config_file("t5")
    wrong = path.with_name("tinny.py")
    assert error_of("t5", config=wrong) == f"config {wrong} not found; nearest: {path}"


def test_checkpoints_that_do_not_load(error_of, checkpoint, tmp_path):
    missing = tmp_path / "missing"
    assert error_of("t5", from_checkpoint(missing)) == (f"{missing} is not a directory; expected a checkpoint's")
    truncated = shutil.copytree(checkpoint, tmp_path / "truncated")
    whole = (checkpoint / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (truncated / "model.safetensors").write_bytes(whole[:size])
        found = error_of("t5", from_checkpoint(truncated))
        assert found.startswith((f"{truncated}/model.safetensors ", f"{truncated}/model.safetensors: "))
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"d_ff": 96}))
    found = error_of("t5", from_checkpoint(other))
    assert found.endswith(f" in {other} has shape [32, 64]; expected [32, 96] by the model's sizes")


def test_records_that_do_not_suit(error_of, tiny_records):
    found = error_of("t5", {"model.changes.vocab_size": 128})
    assert found == "the records' vocabulary has 147 pieces, the model's embedding 128; use the model's own vocabulary"
    causal = {"records": str(tiny_records("causal_lm")), "data.task": "causal_lm"}
    assert error_of("t5", causal) == (
        "data.task='causal_lm' is not for a t5 model; expected one of span_corruption, prefix_lm, supervised"
    )


def test_a_corpus_without_text(error_of, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "blank.txt").write_text("\n\n")
    found = error_of("t5", {"records": None, "data.source": str(empty)})
    assert found == (
        f"source {str(empty)!r} has 0 documents of text, none in the train split; "
        "expected a file or folder of .txt, .md, .py with more text in it"
    )


def test_damaged_records(error_of, tiny_records, tmp_path):
    records = shutil.copytree(tiny_records("span_corruption"), tmp_path / "records")
    manifest, train_records = records / "manifest.json", record_path(records, "train")
    whole = manifest.read_text()
    manifest.write_text(whole[:-20])
    assert error_of("t5", {"records": str(records)}).startswith(f"{manifest} is damaged (")
    manifest.write_text(whole.replace('"format": 1', '"format": 9'))
    assert error_of("t5", {"records": str(records)}) == f"{manifest} has format 9; expected 1: {MEND}"
    manifest.write_text(whole)
    content = train_records.read_bytes()
    train_records.write_bytes(content[:1000])
    found = error_of("t5", {"records": str(records)})
    assert found == f"{train_records} has 1000 bytes; expected {len(content)}: {MEND}"
    train_records.write_bytes(bytes(byte ^ 0xFF for byte in content))
    found = error_of("t5", {"records": str(records)})
    assert found.startswith(str(train_records)) and found.endswith(MEND)


def test_folders_that_no_run_can_have(error_of, checkpoint, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir in (file / "run", file / "deep" / "run", file):
        found = error_of("t5", workdir=workdir)
        assert found == f"workdir {workdir}: {file} is no folder to write in; choose another"
    for workdir in (tmp_path, checkpoint):
        assert (
            error_of("t5", workdir=workdir) == f"workdir {workdir} is not empty and holds no run; choose a new folder"
        )


def test_a_mirror_that_cannot_be(error_of, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    found = error_of("t5", None, f"--config.train.mirror={file}/mirror")
    assert found == f"train.mirror {file}/mirror cannot be made (Not a directory); choose another folder"


def test_folders_of_other_runs(error_of, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    run_folder.claim(workdir, tiny_run("t5"))
    for argument, difference in (
        ("--config.model.changes.d_ff=96", "model.changes.d_ff=64, this one has 96"),
        ("--config.train.seed=1", "train.seed=0, this one has 1"),
    ):
        found = error_of("t5", None, argument)
        assert found == f"workdir {workdir} holds a run with {difference}; choose another folder or the same value"
    (workdir / "finished.json").write_text('{"step": 20}')
    assert error_of("t5") == f"workdir {workdir} holds a finished run of 20 steps; choose another folder or more steps"
    (workdir / "config.json").write_text('{"train": ')
    assert error_of("t5").startswith(f"{workdir}/config.json is not readable JSON: ")


def test_a_folder_that_a_living_run_has(error_of, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: pytest.fail("devices are asked for"))
    with run_folder.locked(tmp_path / "run"):
        found = error_of("t5")
    assert found.startswith(f"workdir {tmp_path / 'run'} is in use by a living run (process {os.getpid()} on ")


def test_told_to_stop_while_records_are_prepared(config_file, monkeypatch, capsys, tmp_path):
    """Nothing is left of them; and the signal is again what it was."""
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGTERM)
    arguments = [f"--config={config_file('t5', {'records': None})}", f"--workdir={tmp_path / 'run'}"]
    write = tokenise.encode_record

    def write_and_receive(row):
        signal.raise_signal(signal.SIGTERM)
        return write(row)

    monkeypatch.setattr(tokenise, "encode_record", write_and_receive)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(train.main)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "SIGTERM before the first step; the same command starts again\n"
    assert os.listdir(tmp_path / "cache" / "records") == [] and not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_of_its_own(run_python, config_file, checkpoint, tmp_path):
    """What the shell sees; and eight devices, which a batch of 12 rows does not divide over."""
    truncated = shutil.copytree(checkpoint, tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes(b"half")
    cases = [
        (config_file("t5"), "--config.train.stpes=5", "unknown key config.train.stpes; nearest: config.train.steps"),
        (
            config_file("t5", from_checkpoint(truncated)),
            "--config.train.steps=5",
            f"{truncated}/model.safetensors has 4 bytes; expected a safetensors file",
        ),
        (
            config_file("t5"),
            "--config.train.batch_size=12",
            "train.batch_size=12 in 1 micro-batch(es) is not divisible",
        ),
    ]
    for config, argument, message in cases:
        process = run_python(
            *("-m", "gqa.train", f"--config={config}", f"--workdir={tmp_path / 'run'}", argument),
            XLA_FLAGS="--xla_force_host_platform_device_count=8",
        )
        assert process.returncode == 2 and process.stdout == ""
        assert process.stderr.startswith(f"error: {message}") and process.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_help_explains_itself(run_python):
    process = run_python("-m", "gqa.train", "--help")
    assert process.returncode == 0 and process.stderr == ""
    assert "python -m gqa.train --config=configs/NAME.py --workdir=DIR" in process.stdout
    assert "goes on from\nits newest checkpoint" in process.stdout
