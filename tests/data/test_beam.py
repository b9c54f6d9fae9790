"""The pipelines write what one process writes, byte for byte; with Beam's local runner."""

import json

import pytest

from gqa.data import beam, prepare, tokenise
from gqa.data.conversations import Conversations
from gqa.data.corpus import SPLITS, Corpus
from gqa.data.tables import Table
from gqa.errors import InputError

LOCAL = ["--runner=DirectRunner", "--direct_running_mode=in_memory"]


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (tokenise, prepare, beam):
        monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(beam, "_FILES_PER_PART", 10)


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def table(tmp_path):
    """Three files of rows, of which some are empty and one is bad."""
    folder = tmp_path / "table"
    folder.mkdir()
    for number in range(3):
        rows = [{"q": f"question {number} {i} " * (i % 5 + 1), "a": f"answer {i}" * (i % 7 > 0)} for i in range(500)]
        lines = [json.dumps(row) for row in rows] + ["{not json"] * (number == 1)
        (folder / f"rows_{number}.jsonl").write_text("\n".join(lines))
    return folder


def test_parts_one_after_the_other_are_the_whole(corpus_folder, table, small_blocks, make_spec):
    spec = make_spec("causal_lm")
    for split in SPLITS:
        source = Corpus(str(corpus_folder))
        parts = beam.parts_of(source, split)
        assert len(parts) == -(-len(source.names(split)) // 10)
        assert [item for part in parts for item in part.items(spec)] == list(source.shuffled(split))
        rows = Table(table, {"inputs": "q", "targets": "a"})
        found = [row for part in rows.parts(split) for row in part.rows(split)]
        assert len(rows.parts(split)) == 3 and found == list(rows.rows(split)) != []


@pytest.mark.parametrize("task", ["span_corruption", "causal_lm"])
def test_text_becomes_the_same_records(task, make_spec, small_blocks, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    here = prepare.prepare(make_spec(task), tmp_path / "here")
    assert prepare.prepare(make_spec(task), tmp_path / "there", beam.writer(LOCAL)) == here
    assert file_bytes(tmp_path / "there") == file_bytes(tmp_path / "here")


def test_pairs_of_a_table_become_the_same_records(table, make_spec, small_blocks, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    fields = {"inputs": "q", "targets": "a"}
    spec = make_spec("supervised", source=str(table), targets_length=16, fields=fields, prefix="ask: ")
    here = prepare.prepare(spec, tmp_path / "here")
    assert prepare.prepare(spec, tmp_path / "there", beam.writer(LOCAL)) == here
    assert file_bytes(tmp_path / "there") == file_bytes(tmp_path / "here")
    assert here.num_skipped["train"]["bad row"] == 1 and here.num_skipped["train"]["empty"] > 100
    with (table / "rows_1.jsonl").open("a") as file:
        file.write("\nmore\nbad\nlines")
    with pytest.raises(InputError, match=r"rows_1.jsonl line 501 is not JSON: '{not json' \(4 bad of 1504 rows"):
        prepare.prepare(spec, tmp_path / "bad", beam.writer(LOCAL))
    assert not (tmp_path / "bad").exists()


def test_conversations_become_the_same_records(chat_vocabulary, make_spec, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    rows = [{"instruction": f"say {i}", "output": "yes " * (i % 4)} for i in range(90)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"source": str(tmp_path / "chats.jsonl"), "vocabulary": str(chat_vocabulary.path)}
    spec = make_spec("sft", template="human_bot", inputs_length=128, **changes)
    here = prepare.prepare(spec, tmp_path / "here")
    assert prepare.prepare(spec, tmp_path / "there", beam.writer(LOCAL)) == here
    assert file_bytes(tmp_path / "there") == file_bytes(tmp_path / "here")
    assert len(beam.parts_of(Conversations(changes["source"], "sft"), "train")) == 1


def test_a_stopped_pipeline_goes_on(make_spec, small_blocks, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    prepare.prepare(make_spec("causal_lm"), tmp_path / "here")
    join, made = beam.join_blocks, []

    def fail(path, num_blocks):
        made.extend(path.parent.glob("*.npz"))
        raise OSError("disk on fire")

    monkeypatch.setattr(beam, "join_blocks", fail)
    with pytest.raises(OSError, match="disk on fire"):
        prepare.prepare(make_spec("causal_lm"), tmp_path / "there", beam.writer(LOCAL))
    monkeypatch.setattr(beam, "join_blocks", join)
    monkeypatch.setattr(tokenise, "packed_records", lambda *_: pytest.fail("a block is made again"))
    assert len(made) > 5
    prepare.prepare(make_spec("causal_lm"), tmp_path / "there", beam.writer(LOCAL))
    assert file_bytes(tmp_path / "there") == file_bytes(tmp_path / "here")


def test_beams_flags_follow_on_two_dashes(make_spec, monkeypatch, tmp_path, capsys):
    seen = {}
    monkeypatch.setattr(beam, "writer", lambda options: seen.setdefault("options", options))
    monkeypatch.setattr(prepare, "report", lambda spec, output, write: seen.update(spec=spec, output=output))
    options = ["--task=c4_lm", "--vocabulary=v", f"--output={tmp_path}", "--", "--runner=X", "--flag", "1"]
    monkeypatch.setattr("sys.argv", ["beam", *options])
    beam.main()
    assert seen["options"] == ["--runner=X", "--flag", "1"] and seen["spec"].task == "c4_lm"
