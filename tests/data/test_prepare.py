import argparse
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest
import sentencepiece
from array_record.python.array_record_module import ArrayRecordReader

from gqa.data import corpus, tokenise
from gqa.data import prepare as prepare_module
from gqa.data.packing import decode_record
from gqa.data.prepare import PrepareSpec, default_directory, prepare, read_manifest, record_path
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError


def read_rows(folder, split):
    reader = ArrayRecordReader(str(record_path(folder, split)))
    rows = [decode_record(record) for record in reader.read_all()] if reader.num_records() else []
    reader.close()
    return rows


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_decoder_brings_its_own_special_ids(corpus_folder, tmp_path):
    """Llama's: unk 0, bos 1, eos 2, no padding; what ends a document is the file's own end."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["def function_0123456789(x):", "return x * y + z", "abcdefghijklmnopqrstuvwxyz"]),
        model_writer=model,
        model_type="char",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    spec = PrepareSpec("causal_lm", str(corpus_folder), str(path), 64, None)
    vocabulary = spec.open_vocabulary()
    assert vocabulary.token_ids == {"bos_token_id": 1, "eos_token_id": 2}
    manifest = prepare(spec, tmp_path / "records")
    assert manifest.vocabulary_size == vocabulary.size < 61
    rows = read_rows(tmp_path / "records", "heldout")
    ends = sum(chunk.tolist().count(2) for row in rows for chunk in row)
    assert ends == manifest.num_documents["heldout"]
    with pytest.raises(InputError, match=r"has pad, eos, unk = \(-1, 2, 0\); expected T5's \(0, 1, 2\)"):
        prepare(dataclasses.replace(spec, task="span_corruption"), tmp_path / "spans")


def test_causal_records_hold_every_token_of_every_document(records, corpus_folder, make_spec):
    manifest = read_manifest(records("causal_lm"))
    vocabulary = Vocabulary(make_spec("causal_lm").vocabulary)
    for split in corpus.SPLITS:
        documents = list(corpus.documents(str(corpus_folder), split))
        wanted = [[*vocabulary.encode(document.text), 1] for document in documents]
        rows = read_rows(records("causal_lm"), split)
        chunks = [chunk.tolist() for row in rows for chunk in row]
        expected = [ids[i : i + 64] for ids in wanted for i in range(0, len(ids), 64)]
        assert sorted(chunks) == sorted(chunk for chunk in expected if len(chunk) > 1)
        assert all(sum(map(len, row)) <= 64 for row in rows)
        assert manifest.num_documents[split] == len(documents)
        assert manifest.num_tokens[split] == sum(map(len, chunks))
        assert manifest.num_records[split] == len(rows)


def test_manifest_says_what_the_records_are_made_from(records, corpus_folder):
    manifest = json.loads((records("span_corruption") / "manifest.json").read_text())
    assert manifest["task"] == "span_corruption"
    assert (manifest["inputs_length"], manifest["targets_length"]) == (64, 14)
    assert manifest["vocabulary_size"] == 4096
    assert manifest["source"] == corpus_folder.name
    assert manifest["corpus_digests"]["train"] == corpus.digest(str(corpus_folder), "train")
    causal = read_manifest(records("causal_lm"))
    assert (causal.inputs_length, causal.targets_length) == (0, 64)


def test_unigram_cross_entropy_is_that_of_the_held_out_targets(records):
    def counts(split):
        tokens = np.concatenate([chunk for row in read_rows(records("causal_lm"), split) for chunk in row])
        return np.bincount(tokens, minlength=4096)

    train, heldout = counts("train"), counts("heldout")
    log_probabilities = np.log((train + 1) / (train.sum() + 4096))
    wanted = -sum(log_probabilities[token] * heldout[token] for token in range(4096)) / heldout.sum()
    assert read_manifest(records("causal_lm")).unigram_cross_entropy == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("task", ["span_corruption", "causal_lm", "prefix_lm"])
def test_bytes_do_not_depend_on_the_machine(task, records, make_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    prepare(make_spec(task), tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(records(task))


def test_existing_records_are_used_again_untouched(records, make_spec):
    before = {path: path.stat().st_mtime_ns for path in records("prefix_lm").iterdir()}
    assert prepare(make_spec("prefix_lm"), records("prefix_lm")) == read_manifest(records("prefix_lm"))
    assert {path: path.stat().st_mtime_ns for path in records("prefix_lm").iterdir()} == before


def test_other_records_in_the_way_are_refused(records, make_spec, tmp_path):
    with pytest.raises(InputError, match="holds records of inputs_length=64; expected 32"):
        prepare(make_spec("span_corruption", inputs_length=32), records("span_corruption"))
    asked = shutil.copytree(records("prefix_lm"), tmp_path / "asked")
    manifest = json.loads((asked / "manifest.json").read_text())
    (asked / "manifest.json").write_text(json.dumps(manifest | {"fields": {"text": "body"}}))
    with pytest.raises(InputError, match=r"holds records of fields=\{'text': 'body'\}; expected None"):
        prepare(make_spec("prefix_lm"), asked)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        prepare(make_spec("span_corruption"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(make_spec, tmp_path, monkeypatch):
    read = corpus.Corpus.read

    def fail_on_heldout(self, name):
        document = read(self, name)
        if document.split == "heldout":
            raise OSError("disk on fire")
        return document

    monkeypatch.setattr(corpus.Corpus, "read", fail_on_heldout)
    with pytest.raises(OSError, match="disk on fire"):
        prepare(make_spec("span_corruption"), tmp_path / "records")
    assert list(tmp_path.iterdir()) == []


def test_default_directory_follows_everything_that_decides_the_records(make_spec, monkeypatch, tmp_path):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path))
    specs = [
        make_spec("span_corruption"),
        make_spec("prefix_lm"),
        make_spec("span_corruption", inputs_length=32),
        make_spec("span_corruption", targets_length=20),
        make_spec("span_corruption", source=argparse.__file__),
    ]
    folders = [default_directory(spec) for spec in specs]
    assert len(set(folders)) == len(specs)
    assert {folder.parent for folder in folders} == {tmp_path / "records"}
    # 14 is what None means for inputs of 64
    assert default_directory(dataclasses.replace(specs[0], targets_length=14)) == folders[0]


def test_text_too_short_for_an_example_is_refused(make_spec, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(InputError, match="is too short for one example of span_corruption"):
        prepare(make_spec("span_corruption", source=str(tmp_path)), tmp_path / "records")


def test_the_working_directory_is_not_replaced(make_spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"output='\.' is where the command runs; expected a folder in it"):
        prepare(make_spec("span_corruption"), ".")
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders_are_refused(make_spec, tmp_path):
    folder = tmp_path / "records"
    prepare(make_spec("causal_lm"), folder)
    manifest = (folder / "manifest.json").read_text()
    train = record_path(folder, "train").read_bytes()
    record_path(folder, "train").write_bytes(train[:-100])
    with pytest.raises(InputError, match=f"has {len(train) - 100} bytes; expected {len(train)}"):
        read_manifest(folder)
    record_path(folder, "train").unlink()
    with pytest.raises(InputError, match="has 0 bytes"):
        read_manifest(folder)
    whole = json.loads(manifest)
    changed = [
        {**whole, "surprise": 1},
        {name: value for name, value in whole.items() if name != "record_bytes"},
        {**whole, "num_records": {"train": 1}},
    ]
    for text in (manifest[:50], "{}", "[]", *map(json.dumps, changed)):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            read_manifest(folder)
    (folder / "manifest.json").write_text(manifest.replace('"format": 1', '"format": 99'))
    with pytest.raises(InputError, match="has format 99; expected 1"):
        read_manifest(folder)


def test_an_interrupted_preparation_goes_on_from_its_last_block(make_spec, tmp_path, monkeypatch):
    for module in (tokenise, prepare_module):
        monkeypatch.setattr(module, "BLOCK", 16)
    prepare(make_spec("causal_lm"), tmp_path / "whole")
    encode_all, calls = Vocabulary.encode_all, []

    def counted(self, texts, num_threads):
        calls.append(len(texts))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode_all(self, texts, num_threads)

    monkeypatch.setattr(Vocabulary, "encode_all", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_spec("causal_lm"), tmp_path / "parts")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts.partial", "whole"]
    assert prepare(make_spec("causal_lm"), tmp_path / "parts") == read_manifest(tmp_path / "whole")
    assert sum(calls) == 120 + 16  # the fifth block was tokenised twice, the four before it once
    assert file_bytes(tmp_path / "parts") == file_bytes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_what_another_preparation_left_is_not_taken_over(make_spec, tmp_path, monkeypatch, records):
    for name in ("identity.json", "train.array_record.00000", "train.array_record.00000.npz"):
        (tmp_path / ".records.partial").mkdir(exist_ok=True)
        (tmp_path / ".records.partial" / name).write_text("{}")
    prepare(make_spec("causal_lm"), tmp_path / "records")
    assert file_bytes(tmp_path / "records") == file_bytes(records("causal_lm"))


def test_two_that_prepare_the_same_do_not_meet(make_spec, tmp_path, records):
    """The second finds the first at work, writes on its own and is there first."""
    (tmp_path / ".records.partial").mkdir()
    descriptor = os.open(tmp_path / ".records.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    prepare(make_spec("causal_lm"), tmp_path / "records")
    os.close(descriptor)
    assert file_bytes(tmp_path / "records") == file_bytes(records("causal_lm"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".records.partial", "records"]


def test_the_manifest_has_sums_lengths_and_a_token_histogram(records):
    manifest = read_manifest(records("causal_lm"))
    for split, expected in manifest.record_sha256.items():
        assert hashlib.sha256(record_path(records("causal_lm"), split).read_bytes()).hexdigest() == expected
        assert sum(manifest.lengths[split]["texts"].values()) == manifest.num_documents[split]
    histogram = json.loads((records("causal_lm") / "token_histogram.json").read_text())
    tokens = np.concatenate([chunk for row in read_rows(records("causal_lm"), "train") for chunk in row])
    np.testing.assert_array_equal(histogram["train"], np.bincount(tokens, minlength=4096))
