"""Whole cleanings: planted copies, reports, the same for any number of processes, nothing half-written."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gqa.command_line import load_config
from gqa.data import clean as clean_module
from gqa.data import tables
from gqa.data.clean import clean, make_spec
from gqa.data.cleaning import parse
from gqa.data.cleaning_report import Report
from gqa.errors import InputError

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "configs" / "cleaning" / "text.py"
PAIRS = ROOT / "configs" / "cleaning" / "instructions.py"
LENIENT = ["--config.text.min_words=5", "--config.text.min_stop_words=0", "--config.duplicates.ngram=3"]


def document(i: int) -> str:
    """Sentences of their own words."""
    return " ".join(f"word{i}x{j}" if j % 3 else f"the common{j}" for j in range(60)) + "."


def text_config(*overrides):
    return parse(load_config(TEXT, [*LENIENT, "--config.text.max_mean_word_length=12.0", *overrides]))


def write(path: Path, rows) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def planted(tmp_path):
    """90 documents, with copies of 3, 5 and 7 planted: exact, of other case and spaces, and with words changed."""
    texts = [document(i) for i in range(90)]
    texts[40] = texts[3]
    texts[41] = texts[5].upper().replace(" ", "  ")
    words = texts[7].split()
    words[10] = "changed"
    texts[42] = " ".join(words)  # 3 of about 78 3-grams differ
    words[20], words[30], words[40], words[50], words[60] = "one two three four five".split()
    texts[43] = " ".join(words)  # too many differ
    texts[50] = "too short"
    texts[60] = texts[60].replace("the", "thÃ©")
    return write(tmp_path / "documents.jsonl", [{"id": str(i), "body": text} for i, text in enumerate(texts)])


def run(config, source, output, workers=1, **options):
    fields = options.pop("fields", {"text": "body"})
    return clean(config, make_spec(config, str(source), fields, **options), output, workers)


def test_planted_copies_are_dropped_and_reported(planted, tmp_path):
    report = run(text_config(), planted, tmp_path / "clean.jsonl", keep=["body", "id"])
    rows = read(tmp_path / "clean.jsonl")
    assert [int(row["id"]) for row in rows] == [i for i in range(90) if i not in (40, 41, 42, 50)]
    assert list(rows[0]) == ["body", "id"] and rows[0]["body"] == document(0)
    assert any("thé common0" in row["body"] for row in rows)  # `body` is kept repaired
    assert (report.read, report.kept, report.repaired, report.bad) == (90, 86, 1, 0)
    assert report.dropped == {"exact duplicate": 2, "near duplicate": 1, "length": 1}
    found = json.loads((tmp_path / "clean.report.json").read_text())
    assert found["rows"] == {"read": 90, "bad": 0, "kept": 86, "repaired": 1}
    assert found["dropped"]["exact duplicate"]["share"] == round(2 / 90, 6)
    assert [example["where"] for example in found["dropped"]["exact duplicate"]["examples"]] == [
        f"{planted} line 41",
        f"{planted} line 42",
    ]
    near = found["dropped"]["near duplicate"]["examples"][0]
    assert near["where"] == f"{planted} line 43" and near["why"].endswith(f"alike {planted} line 8")
    assert found["dropped"]["length"]["examples"][0]["why"] == "2 words; expected 5 to 100000"
    markdown = (tmp_path / "clean.report.md").read_text()
    assert "| exact duplicate | 2 | 2.22% |" in markdown and "| **kept** | 86 | 95.56% |" in markdown
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clean.jsonl",
        "clean.report.json",
        "clean.report.md",
        "documents.jsonl",
    ]


def test_the_same_for_one_process_and_for_two(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(clean_module, "_ROWS_PER_CALL", 16)
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        run(text_config("--config.order=similarity"), planted, folder / "clean.jsonl", workers)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "12"]
    assert len(files[0]) == 3 and files[0] == files[1]


def test_documents_that_are_alike_follow_on_each_other(tmp_path):
    topics = ["engine wheel road driver garage".split(), "flour butter oven sugar recipe".split()]
    words = [[f"{word}{i % 4}" for word in topics[i % 2] for i in (0,)] for i in range(2)]
    texts = [" ".join([*words[i % 2], *words[i % 2], f"number{i}"]) for i in range(12)]
    source = write(tmp_path / "a.jsonl", [{"body": text} for text in texts])
    config = text_config(
        "--config.order=similarity",
        "--config.duplicates.near=false",
        "--config.text.max_duplicate_ngrams=()",
        "--config.text.max_top_ngrams=()",
    )
    run(config, source, tmp_path / "clean.jsonl")
    order = [texts.index(row["body"]) for row in read(tmp_path / "clean.jsonl")]
    assert sorted(order) == list(range(12))
    assert [i % 2 for i in order] == [0] * 6 + [1] * 6


def test_pairs_of_a_csv_file_against_an_evaluation_set(tmp_path):
    rows = [
        ("What is the capital of France?", "Paris is the capital."),
        ("Name the river that runs through the old town of Bern, please.", "The Aare runs through it."),
        ("What is the capital of France?", "Paris is the capital."),
        ("Say it", "say it"),
        ("Tell me a story", "ChatGPT tells none"),
    ]
    source = tmp_path / "qa.csv"
    source.write_text("question,answer\n" + "".join(f'"{q}","{a}"\n' for q, a in rows))
    test = write(tmp_path / "test.jsonl", [{"q": "name the river that runs through the old town", "a": "Aare"}])
    config = parse(load_config(PAIRS))
    options = dict(fields={"inputs": "question", "targets": "answer"}, evaluation=[test])
    report = run(config, source, tmp_path / "clean.jsonl", **options)
    assert read(tmp_path / "clean.jsonl") == [{"question": rows[0][0], "answer": rows[0][1]}]
    assert report.dropped == {"contamination": 1, "exact duplicate": 1, "similarity": 1, "targets: blocked words": 1}
    found = json.loads((tmp_path / "clean.report.json").read_text())
    assert found["evaluation_texts"] == {"read": 2, "too_short": 1}
    said = "Held against the evaluation sets test.jsonl; 1 of 2 evaluation texts are shorter than 8 words and were not"
    assert said in (tmp_path / "clean.report.md").read_text()


def test_a_folder_of_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(1001):
        (folder / f"{i:04}.txt").write_text(f"one two three four five six {document(i)[:80]} {i}")
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    report = run(text_config("--config.duplicates.near=false"), folder, tmp_path / "clean.jsonl", fields=None)
    assert (report.read, report.bad, report.kept) == (1001, 1, 1001)
    assert list(read(tmp_path / "clean.jsonl")[0]) == ["text"]


def test_one_bad_line_in_a_thousand_is_counted_and_two_are_refused(tmp_path):
    rows = [{"body": f"{document(i)}"} for i in range(1000)]
    config = text_config("--config.duplicates.near=false")
    source = write(tmp_path / "a.jsonl", [*rows[:500], '{"body": \n', *rows[500:]])
    assert run(config, source, tmp_path / "clean.jsonl").bad == 1
    before = (tmp_path / "clean.jsonl").read_bytes()
    source = write(tmp_path / "a.jsonl", [*rows[:500], '{"body": \n', '{"boby": "x"}\n', *rows[500:]])
    with pytest.raises(InputError, match=r"a\.jsonl line 501 is not JSON: .* \(2 bad of 1002 rows; expected at most"):
        run(config, source, tmp_path / "clean.jsonl")
    assert (tmp_path / "clean.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {"inputs": "body", "targets": "id"}}, "expected the columns of text"),
        ({"fields": {"text": "boby"}}, r"line 1: there is no 'boby'; nearest: body \(1 bad of 1 rows"),
        ({"split": "test"}, "has no split 'test'; expected train, heldout"),
        ({"evaluation": ["none.jsonl"]}, "'none.jsonl' not found"),
    ],
)
def test_bad_input_is_refused(options, message, tmp_path):
    write(tmp_path / "a.jsonl", [{"id": "1", "body": document(1)}])
    with pytest.raises(InputError, match=message):
        run(text_config(), tmp_path / "a.jsonl", tmp_path / "clean.jsonl", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_files_split_by_name_are_cleaned_one_split_at_a_time(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for number, name in enumerate(("train.jsonl", "dev.jsonl")):
        write(folder / name, [{"body": document(number)}])
    with pytest.raises(InputError, match="are split by name; name a split: train, heldout"):
        run(text_config(), folder, tmp_path / "clean.jsonl")
    run(text_config(), folder, tmp_path / "clean.jsonl", split="heldout")
    assert read(tmp_path / "clean.jsonl") == [{"body": document(1)}]


def test_sources_and_outputs_that_do_not_fit_are_refused(tmp_path):
    config = text_config()
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match=r"nothing is left of 1 rows .*; dropped: 1 length"):
        clean(config, make_spec(config, str(tmp_path)), tmp_path / "clean.jsonl", 1)
    with pytest.raises(InputError, match=r"is no \.jsonl file"):
        clean(config, make_spec(config, str(tmp_path)), tmp_path / "clean.txt", 1)
    with pytest.raises(InputError, match="there is no folder"):
        clean(config, make_spec(config, str(tmp_path)), tmp_path / "none" / "clean.jsonl", 1)
    (there := tmp_path / "there.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match="is read as the source; name another file"):
        clean(config, make_spec(config, str(there)), there, 1)
    assert there.read_text() == '{"text": "x"}\n'
    there.unlink()
    with pytest.raises(InputError, match="is text; expected a table with inputs and targets"):
        make_spec(parse(load_config(PAIRS)), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_two_that_clean_to_one_output_leave_each_other_alone(tmp_path, monkeypatch):
    """While one is at it, another fails, and a third ends: what is there is whole."""
    sources = [
        write(tmp_path / f"{name}.jsonl", rows)
        for name, rows in zip(
            "abc",
            ([{"body": document(i)} for i in range(4)], [{"body": "short"}], [{"body": document(9)}]),
            strict=True,
        )
    ]
    output, add, seen = tmp_path / "clean.jsonl", Report.add, []

    def add_after_others(self, *row):
        if not seen:
            seen.append("the others add rows too")
            with pytest.raises(InputError, match="nothing is left of 1 rows"):
                run(text_config(), sources[1], output)
            run(text_config(), sources[2], output)
            seen.append(read(output))
        add(self, *row)

    monkeypatch.setattr(Report, "add", add_after_others)
    run(text_config(), sources[0], output)
    assert seen[1] == [{"body": document(9)}] and read(output) == [{"body": document(i)} for i in range(4)]
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".clean.0abc.jsonl").write_text("{cut")  # of a process that was killed
    assert [path.name for path in tables.table_files(tmp_path)] == ["a.jsonl", "b.jsonl", "c.jsonl", "clean.jsonl"]


def test_a_kill_leaves_neither_output_nor_workers(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": document(i)} for i in range(300)])
    (tmp_path / "killed.py").write_text(
        "import multiprocessing, os, signal\n"
        "from gqa import command_line\n"
        "from gqa.data import clean, cleaning_report\n"
        "def add(self, *row):\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    cleaning_report.Report.add = add\n"
        "    command_line.run(clean.main)\n"
    )
    output = tmp_path / "clean.jsonl"
    command = [sys.executable, str(tmp_path / "killed.py"), f"--config={TEXT}", *LENIENT, "--workers=2"]
    killed = subprocess.run(
        [*command, f"--source={source}", f"--output={output}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workers = killed.stdout.split()
    assert len(workers) == 2
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):  # gone already
            descriptor = os.pidfd_open(int(worker))
            assert select.select([descriptor], [], [], 60)[0], "a worker outlives its parent"
            os.close(descriptor)
    left = list(tmp_path.glob(".clean*"))  # it may be of one that still writes: nothing takes it for its own
    assert not list(tmp_path.glob("clean.*")) and len(left) == 1
    run(text_config(), source, output, fields=None)
    assert len(read(output)) == 300 and list(tmp_path.glob(".clean*")) == left
