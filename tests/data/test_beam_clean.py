"""Cleaning as a pipeline: the bytes of one process, for planted copies, pairs, text and bad rows."""

import json
from pathlib import Path

import pytest

from gqa.command_line import load_config
from gqa.data import beam_clean, clean
from gqa.data.cleaning import parse
from gqa.errors import InputError

LOCAL = ["--runner=DirectRunner", "--direct_running_mode=in_memory"]
TEXT = Path(__file__).parents[2] / "configs" / "cleaning" / "text.py"
LENIENT = [
    "--config.text.min_words=5",
    "--config.text.min_stop_words=0",
    "--config.text.max_mean_word_length=12.0",
    "--config.duplicates.ngram=3",
]


def config(*overrides):
    return parse(load_config(TEXT, [*LENIENT, *overrides]))


def both(config, spec, tmp_path):
    """The files of a cleaning by one process, and by a pipeline."""
    found = []
    for name, run in (
        ("here", lambda output: clean.clean(config, spec, output, 1)),
        ("there", lambda output: beam_clean.clean(config, spec, output, LOCAL)),
    ):
        (tmp_path / name).mkdir()
        run(tmp_path / name / "clean.jsonl")
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    return found


@pytest.fixture
def folder(tmp_path):
    """Three files of documents; a chain of near-copies over all of them, exact copies, short and bad rows."""
    folder = tmp_path / "documents"
    folder.mkdir()
    words = [[f"word{i}x{j}" if j % 3 else f"the common{j}" for j in range(60)] for i in range(40)]
    texts = [" ".join(words[i]) + "." for i in range(40)]
    for i, place in enumerate((8, 17, 23, 31)):  # each differs from the one before: the first is not like the last
        words[5][10 + 8 * i : 12 + 8 * i] = [f"changed{i}", f"again{i}"]
        texts[place] = " ".join(words[5])
    texts[12], texts[33] = texts[3], texts[3].upper()
    texts[20] = "too short"
    for number in range(3):
        rows = [json.dumps({"body": text, "id": str(i)}) for i, text in enumerate(texts) if i * 3 // 40 == number]
        (folder / f"part_{number}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("overrides", [[], ["--config.duplicates.near=false"], ["--config.duplicates.exact=false"]])
def test_a_table_is_cleaned_to_the_same_bytes(overrides, folder, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    monkeypatch.setattr(beam_clean, "_ROWS_PER_FILE", 5)
    spec = clean.make_spec(config(), str(folder), {"text": "body"}, keep=["id"])
    here, there = both(config("--config.duplicates.similarity=0.8", *overrides), spec, tmp_path)
    assert sorted(there) == ["clean.jsonl", "clean.report.json", "clean.report.md"] and there == here
    dropped = json.loads(there["clean.report.json"])["dropped"]
    assert {name.split()[1] for name in dropped if "duplicate" in name} == {"duplicate"} and "length" in dropped
    if not overrides:
        assert 0 < dropped["near duplicate"]["rows"] < 4 and dropped["exact duplicate"]["rows"] == 2


def test_texts_without_words_are_no_near_copies(tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    texts = ["+ - + - +", "- + - + -", "+ -  + - +", "= = = + -", "= = = + -"]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    lenient = [f"--config.text.{name}=0.0" for name in ("min_alphabetic_words", "min_mean_word_length")]
    lenient += [f"--config.text.max_{name}_ngrams=()" for name in ("top", "duplicate")]
    lenient += ["--config.text.max_symbols_per_word=9.0", "--config.text.max_bullet_lines=1.0"]
    spec = clean.make_spec(config(), str(source), {"text": "body"})
    here, there = both(config(*lenient), spec, tmp_path)
    assert there == here
    dropped = json.loads(here["clean.report.json"])["dropped"]
    assert {name: filtered["rows"] for name, filtered in dropped.items()} == {"exact duplicate": 2}


def test_text_is_cleaned_to_the_same_bytes(folder, tmp_path, monkeypatch):
    """With an evaluation set, and a file that is not UTF-8 among 1100."""
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    monkeypatch.setattr(beam_clean, "_FILES_PER_PART", 300)
    texts = [json.loads(line)["body"] for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]
    (tmp_path / "text").mkdir()
    for i in range(1100):
        (tmp_path / "text" / f"{i:04}.txt").write_text(texts[i % 40] if i < 40 else f"short {i}")
    (tmp_path / "text" / "0500.txt").write_bytes(b"\xff")
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"q": texts[2]}))
    spec = clean.make_spec(config(), str(tmp_path / "text"), evaluation=[tmp_path / "evaluation.jsonl"])
    here, there = both(config(), spec, tmp_path)
    assert there == here and b'"contamination"' in here["clean.report.json"]
    assert json.loads(here["clean.report.json"])["rows"]["bad"] == 1


def test_what_is_refused(folder, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    spec = clean.make_spec(config(), str(folder), {"text": "body"})
    output = tmp_path / "out" / "clean.jsonl"
    output.parent.mkdir()
    with pytest.raises(InputError, match="order='similarity' is for one machine"):
        beam_clean.clean(config("--config.order=similarity"), spec, output, LOCAL)
    with pytest.raises(InputError, match="nothing is left of 40 rows"):
        beam_clean.clean(config("--config.text.min_words=1000"), spec, output, LOCAL)
    with (folder / "part_1.jsonl").open("a") as file:
        file.write("{not json\n")
    with pytest.raises(InputError, match=r"part_1.jsonl line 14 is not JSON: .* \(1 bad of 41 rows"):
        beam_clean.clean(config(), spec, output, LOCAL)
    (folder / "part_2.jsonl").rename(folder / "part_2.csv")
    with pytest.raises(InputError, match=r"part_2.csv has no column 'body' among"):
        beam_clean.clean(config(), clean.make_spec(config(), str(folder), {"text": "body"}), output, LOCAL)
    assert list(output.parent.iterdir()) == []
