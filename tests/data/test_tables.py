import json

import pytest

from gqa.data.tables import BadRow, Table, read_rows
from gqa.errors import InputError

FIELDS = {"inputs": "question", "targets": "answer"}
ROWS = [
    {"inputs": "Wer, was?", "targets": "Ein „Zitat“"},
    {"inputs": "two\nlines", "targets": 'a "quoted" word'},
    {"inputs": "x" * 200_000, "targets": "a\ttab"},  # longer than the csv module's own limit
]
FILES = {
    "a.jsonl": "".join(
        json.dumps({"id": 7, "question": row["inputs"], "answer": row["targets"]}) + "\n\n" for row in ROWS
    ),
    "a.csv": "\ufeffid,answer,question\n"
    + "".join('7,"{}","{}"\n'.format(row["targets"].replace('"', '""'), row["inputs"]) for row in ROWS),
    "a.tsv": "question\tanswer\n"
    + "".join('"{}"\t"{}"\n'.format(row["inputs"], row["targets"].replace('"', '""')) for row in ROWS),
}


def good(i: int) -> str:
    return json.dumps({"question": f"q {i}", "answer": f"a {i}"}) + "\n"


@pytest.mark.parametrize("name", FILES)
def test_every_form_reads_the_same_rows(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert list(read_rows(tmp_path / name, FIELDS)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "q", "answer"\n', 'line 1 is not JSON: \'{"question": "q", "answer"\''),
        ("a.jsonl", b"[1, 2]\n", "line 1 is a list; expected an object"),
        ("a.jsonl", b'\n{"question": "q", "anser": "a"}\n', "line 2: there is no 'answer'; nearest: anser"),
        ("a.jsonl", b'{"question": "q", "answer": 3}\n', "line 1: 'answer' is a int; expected a text"),
        ("a.jsonl", b'{"question": "q", "answer": null}\n', "line 1: 'answer' is a NoneType; expected a text"),
        ("a.jsonl", b'{"question": "\xff", "answer": "a"}\n', "line 1 is not UTF-8: byte 14 is 0xff"),
        ("a.csv", b"question,answer\nq,a\nq,a,b\n", "line 3 has 3 columns; expected 2"),
        ("a.csv", b"question,answer\nq,a\xfe\n", "line 2 is not UTF-8: byte 3 is 0xfe"),
        ("a.tsv", b'question\tanswer\nq\t"a"b\n', "line 2 is not TSV: '\t' expected after '\"'"),
        ("a.tsv", b'question\tanswer\nq\t"a\n', "line 2 is not TSV: unexpected end of data"),
        ("a.csv", b'question,answer\nq,a\n"q\nbad \xff\nq",a\nq,a\n', "line 4 is not UTF-8: byte 4 is 0xff"),
    ],
)
def test_a_bad_row_says_where_and_what(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    bad = [row for row in read_rows(tmp_path / name, FIELDS) if isinstance(row, BadRow)]
    assert [str(row) for row in bad] == [f"{tmp_path / name} {message}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,anser\nq,a\n", "no column 'answer' among question, anser; nearest: anser"),
        ("", "no columns; expected answer, question"),
        ("question,answer,,,question\nq,a,,,q\n", "the column 'question' twice; expected each name once"),
    ],
)
def test_a_missing_column_is_refused_with_the_nearest(content, message, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=rf"a\.csv has {message}$"):
        list(read_rows(tmp_path / "a.csv", FIELDS))


def test_one_bad_row_in_a_thousand_is_passed_over_and_counted(tmp_path):
    lines = [good(i) for i in range(2000)]
    lines[700] = '{"question": \n'
    lines[1500] = '{"question": "no answer"}\n'
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "validation.jsonl").write_text(good(1))
    table = Table(tmp_path, FIELDS)
    assert [row["inputs"] for row in table.rows("train")] == [f"q {i}" for i in range(2000) if i not in (700, 1500)]
    assert table.skipped == {"train": {"bad row": 2}, "heldout": {}, "test": {}}
    (tmp_path / "train.jsonl").write_text("".join(lines[:1999]))
    with pytest.raises(
        InputError, match=r"train\.jsonl line 701 is not JSON: .* \(2 bad of 1999 rows; expected at most"
    ):
        list(table.rows("train"))


def test_a_file_of_bad_rows_is_refused_before_its_end(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join("{}\n" for _ in range(10_000)))
    with pytest.raises(InputError, match=r"line 1: there is no 'question'; nearest: None \(100 bad of 100 rows"):
        list(Table(tmp_path / "a.jsonl", FIELDS).rows("train"))


def test_all_rows_that_a_stray_quotation_mark_takes_in_are_bad(tmp_path):
    rows = [f"q {i},a {i}\n" for i in range(40)]
    rows[20] = '"q 20,a 20\n'
    rows[29] = 'q 29,"a" 29\n'
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(rows))
    found = list(read_rows(tmp_path / "a.csv", FIELDS))
    bad = [str(row).split(": ")[0] for row in found if isinstance(row, BadRow)]
    assert bad == [f"{tmp_path / 'a.csv'} line {line} is not CSV" for line in range(22, 32)]
    assert len(found) == 40
    (tmp_path / "a.csv").write_text('"question" x,answer\nq,a\n')
    with pytest.raises(InputError, match=r"a\.csv line 1 is not CSV: ',' expected"):
        list(read_rows(tmp_path / "a.csv", FIELDS))


def test_files_named_after_splits_are_those_splits(tmp_path):
    for i, name in enumerate(["train-0.jsonl", "train-1.jsonl", "dev.jsonl", "test.jsonl"]):
        (tmp_path / name).write_text(good(i))
    (tmp_path / "notes.txt").write_text("no table")
    table = Table(tmp_path, FIELDS)
    assert table.splits == ["train", "heldout", "test"]
    found = {split: [row["inputs"] for row in table.rows(split)] for split in table.splits}
    assert found == {"train": ["q 0", "q 1"], "heldout": ["q 2"], "test": ["q 3"]}


def test_files_of_other_names_are_in_no_split(tmp_path):
    names = ["train2.jsonl", "Training_a.csv", "val.jsonl", "dev-1.csv", "test.v1.tsv", "testset.jsonl"]
    for i, name in enumerate(names):
        (tmp_path / name).write_text(good(i))
    found = {
        split: [file.name for file in Table(tmp_path, FIELDS).files(split)] for split in ("train", "heldout", "test")
    }
    assert found == {
        "train": ["Training_a.csv", "train2.jsonl"],
        "heldout": ["dev-1.csv", "val.jsonl"],
        "test": ["test.v1.tsv", "testset.jsonl"],
    }
    others = ["develop.jsonl", "testimonials.jsonl", "trainé.jsonl", "values.jsonl"]
    for name in others:
        (tmp_path / name).write_text(good(9))
    with pytest.raises(InputError, match=rf"by the names of its files, and {', '.join(others)} in no split; expected"):
        Table(tmp_path, FIELDS)
    (tmp_path / "val.jsonl").unlink()
    (tmp_path / "dev-1.csv").unlink()
    table = Table(tmp_path, FIELDS)
    assert table.files("train") == table.files("heldout") and len(table.files("train")) == 6


def test_a_file_is_split_by_what_is_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(good(i // 2) for i in range(2000)))
    table = Table(path, FIELDS)
    train, heldout = ([row["inputs"] for row in table.rows(split)] for split in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(f"q {i // 2}" for i in range(2000))
    assert not set(train) & set(heldout)
    assert 60 < len(heldout) < 140
    assert table.digest("train") != table.digest("heldout") == Table(path, FIELDS).digest("heldout")


def test_files_named_test_are_never_trained_on(tmp_path):
    for name, rows in {"train.jsonl": range(100), "more.jsonl": range(100, 200), "test.jsonl": range(200, 240)}.items():
        (tmp_path / name).write_text("".join(map(good, rows)))
    table = Table(tmp_path, FIELDS)
    assert table.splits == ["train", "heldout", "test"]
    found = {split: [int(row["inputs"][2:]) for row in table.rows(split)] for split in table.splits}
    assert sorted(found["train"] + found["heldout"]) == list(range(200)) and found["heldout"]
    assert found["test"] == list(range(200, 240))
    with pytest.raises(InputError, match=r"are split by name; name a split: train, test$"):
        table.all_files  # noqa: B018
    for name in ("train.jsonl", "more.jsonl"):
        (tmp_path / name).unlink()
    assert Table(tmp_path, FIELDS).splits == ["test"]
    assert Table(tmp_path, FIELDS).all_files == [tmp_path / "test.jsonl"]
    alone = Table(tmp_path / "test.jsonl", FIELDS)  # a file is split by what is asked, whatever its name
    assert alone.splits == ["train", "heldout"] and alone.all_files == [tmp_path / "test.jsonl"]


@pytest.mark.parametrize("num_rows", [10, 300])
def test_the_split_is_that_of_the_inputs_and_holds_one_out(num_rows, tmp_path):
    """In whatever order the fields are, in parts as in the whole, halves of surrogate pairs and all."""
    for half in range(2):
        rows = map(good, range(half, num_rows, 2))
        (tmp_path / f"{half}.jsonl").write_text("".join(rows) + '{"question": "\\ud800", "answer": "a"}\n')
    table, turned = Table(tmp_path, FIELDS), Table(tmp_path, dict(reversed(FIELDS.items())))
    found = {split: list(table.rows(split)) for split in table.splits}
    assert sum(map(len, found.values())) == num_rows + 2
    assert len(found["heldout"]) == 1 if num_rows == 10 else 5 < len(found["heldout"]) < 30
    for split in table.splits:
        assert list(turned.rows(split)) == found[split] and turned.digest(split) == table.digest(split)
        assert [row for part in Table(tmp_path, FIELDS).parts(split) for row in part.rows(split)] == found[split]


def test_a_path_without_tables_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no table; expected files of \.jsonl, \.csv, \.tsv, \.parquet"):
        Table(tmp_path, FIELDS)
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(InputError, match=r"a\.xlsx is no table"):
        list(read_rows(tmp_path / "a.xlsx", FIELDS))
