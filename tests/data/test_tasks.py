import json
import sys

import pytest

from gqa.command_line import run
from gqa.data import tasks
from gqa.data.loader import heldout_batches, train_batches
from gqa.data.prepare import PrepareSpec, prepare
from gqa.errors import InputError

SUMMARIZE, TRANSLATE = "summarize: ", "translate English to German: "


def test_the_paper_s_lengths_prefixes_and_scores():
    """GQA §3.1."""
    found = {
        name: (task.objective, task.inputs_length, task.targets_length, task.prefix, task.metric)
        for name, task in tasks.NAMED_TASKS.items()
        if task.source
    }
    assert found == {
        "c4_span_corruption": ("span_corruption", 512, None, "", None),
        "c4_lm": ("causal_lm", 512, None, "", None),
        "cnn_dailymail": ("supervised", 512, 256, SUMMARIZE, "rouge"),
        "arxiv": ("supervised", 2048, 512, SUMMARIZE, "rouge"),
        "pubmed": ("supervised", 2048, 512, SUMMARIZE, "rouge"),
        "media_sum": ("supervised", 2048, 512, SUMMARIZE, "rouge"),
        "multi_news": ("supervised", 2048, 512, SUMMARIZE, "rouge"),
        "wmt14_en_de": ("supervised", 512, 256, TRANSLATE, "bleu"),
        "trivia_qa": ("supervised", 2048, 32, "", "trivia_qa"),
        "docstring": ("supervised", 512, 64, SUMMARIZE, "rouge"),
        "long_docstring": ("supervised", 2048, 512, SUMMARIZE, "rouge"),
    }


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("cnn_dailymail", {"article": "a", "highlights": "h"}, ("a", "h", ("h",))),
        ("arxiv", {"article": "a", "abstract": "b", "section_names": ""}, ("a", "b", ("b",))),
        ("multi_news", {"document": "d", "summary": "s"}, ("d", "s", ("s",))),
        ("wmt14_en_de", {"en": "house", "de": "Haus"}, ("house", "Haus", ("Haus",))),
        (
            "media_sum",
            {"speaker": ["HOST", "GUEST"], "utt": ["Who?", "I."], "summary": "s"},
            ("HOST: Who?\nGUEST: I.", "s", ("s",)),
        ),
        (
            "trivia_qa",
            {
                "question": "Who?",
                "entity_pages": {"wiki_context": ["A wiki."]},
                "search_results": {"search_context": ["The web.", "More."]},
                "answer": {"value": "Ann", "aliases": ["Ann", "Anne"]},
            },
            ("question: Who? context: A wiki. The web. More.", "Ann", ("Ann", "Anne")),
        ),
    ],
)
def test_rows_of_public_datasets(name, row, expected):
    assert tasks.NAMED_TASKS[name].read(row) == tasks.Example(*expected)


@pytest.mark.parametrize(
    ("name", "fields", "row", "message"),
    [
        ("supervised", None, {"input": "a"}, "there is no column 'targets' among input; nearest: "),
        (
            "supervised",
            {"inputs": "q", "targets": "label"},
            {"q": "a", "label": 7},
            "column 'label' is a int; expected a text",
        ),
        ("causal_lm", {"text": "txet"}, {"text": "a"}, "there is no column 'txet' among text; nearest: text"),
        ("media_sum", None, {"document": "a", "summary": "b"}, "there is no column 'speaker' among document, summary"),
        ("trivia_qa", None, {"question": "a", "answer": "b"}, "there is no column 'entity_pages' among question"),
    ],
)
def test_a_public_dataset_of_other_columns_is_refused(name, fields, row, message, monkeypatch):
    monkeypatch.setattr(tasks.public.PublicDataset, "rows", lambda *_: iter([row]))
    source = tasks.open_source(name, "tfds:other", fields)
    with pytest.raises(InputError, match=message):
        next(tasks.texts_of(name, source, "train", fields))


@pytest.fixture
def pairs(tmp_path):
    """A folder of a CSV each of train and dev, three pairs in train, one of them empty."""
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "train.csv").write_text("q,a\nx+y,z\nxxxxxxxxxxxx,yyyyyyyyyyyy\n ,z\n")
    (tmp_path / "pairs" / "dev.csv").write_text("q,a\nx,y\nz,z\n")
    return tmp_path / "pairs"


def test_batches_of_the_user_s_own_table(pairs, tiny_vocabulary, tmp_path):
    spec = PrepareSpec("supervised", str(pairs), str(tiny_vocabulary), 16, 8, {"inputs": "q", "targets": "a"}, "def ")
    manifest = prepare(spec, tmp_path / "records")
    assert manifest.num_documents == {"train": 2, "heldout": 2}
    assert manifest.num_tokens == {"train": (8 + 2) + (16 + 8), "heldout": 2 * (6 + 2)}
    assert manifest.num_skipped == {"train": {"empty": 1}, "heldout": {}}
    assert manifest.num_trimmed == {"train": {"inputs": 1, "targets": 1}, "heldout": {"inputs": 0, "targets": 0}}
    assert manifest.lengths["train"] == {"inputs": {"8": 1, "32": 1}, "targets": {"2": 1, "16": 1}}
    vocabulary = spec.open_vocabulary()
    batch = heldout_batches(tmp_path / "records", 1, None)(0)
    d, e, f, space, x, y, z = (vocabulary.encode(letter)[0] for letter in "def xyz")
    assert {name: array[0].tolist() for name, array in batch.items()} == {
        "inputs": [d, e, f, space, x, 1, d, e, f, space, z, 1, 0, 0, 0, 0],
        "inputs_segments": [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0],
        "targets": [y, 1, z, 1, 0, 0, 0, 0],
        "targets_segments": [1, 1, 2, 2, 0, 0, 0, 0],
        "decoder_inputs": [0, y, 0, z, 0, 0, 0, 0],
        "loss_weights": [1, 1, 1, 1, 0, 0, 0, 0],
    }
    train = train_batches(tmp_path / "records", 2, seed=0)(0)
    (longest,) = (row for row in train["inputs"].tolist() if 0 not in row)
    assert longest == [d, e, f, space, *[x] * 11, 1]
    histogram = json.loads((tmp_path / "records" / "token_histogram.json").read_text())
    assert {i: n for i, n in enumerate(histogram["heldout"]) if n} == {1: 2, y: 1, z: 1}


def test_text_of_a_table(tmp_path, tiny_vocabulary):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"body": "def f(x):"}\n{"body": "x"}\n{"body": ""}\n')
    spec = PrepareSpec("causal_lm", str(tmp_path), str(tiny_vocabulary), 16, None, {"text": "body"})
    manifest = prepare(spec, tmp_path / "records")
    assert manifest.num_tokens == {"train": 9 + 1 + 1 + 1, "heldout": 12}
    assert manifest.num_skipped == {"train": {"empty": 1}, "heldout": {"empty": 1}}


def test_docstrings_are_prepared_from_source(tmp_path, tiny_vocabulary):
    for i in range(40):
        (tmp_path / f"{i}.py").write_text(f'def f_{i}(x):\n    """Gives the number {i}."""\n    return {i}\n')
    spec = PrepareSpec("docstring", str(tmp_path), str(tiny_vocabulary), None, None)
    manifest = prepare(spec, tmp_path / "records")
    assert (manifest.inputs_length, manifest.targets_length, manifest.prefix) == (512, 64, SUMMARIZE)
    assert sum(manifest.num_documents.values()) == 40
    batch = train_batches(tmp_path / "records", 2, seed=0)(0)
    assert (batch["inputs"].shape, batch["targets"].shape) == ((2, 512), (2, 64))


def test_a_split_without_rows_is_named(tmp_path, tiny_vocabulary):
    (tmp_path / "test.jsonl").write_text('{"text": "def f(x):"}\n')
    spec = PrepareSpec("causal_lm", str(tmp_path), str(tiny_vocabulary), 16, None, {"text": "text"})
    with pytest.raises(InputError, match=r"the train split of .* has nothing in it$"):
        prepare(spec, tmp_path / "records")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit=0", "--output=rows.jsonl"], "--limit=0; expected 1 or more"),
        (["--output=pairs"], "--output=pairs is a folder; expected a file to write, such as supervised.jsonl"),
        (["--output=rows.jsonl", "--fields=inputs=q,inputs=a"], "'inputs=q,inputs=a' names a role twice"),
    ],
)
def test_impossible_rows_for_evaluation_are_refused(arguments, message, pairs, monkeypatch, capsys):
    monkeypatch.chdir(pairs.parent)
    arguments = ["--task=supervised", "--source=pairs", "--fields=inputs=q,targets=a", *arguments]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        run(tasks.main)
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in pairs.parent.iterdir()] == ["pairs"]


def test_rows_for_evaluation_have_the_prefix_and_all_answers(pairs, tmp_path, monkeypatch, capsys):
    (pairs / "dev.csv").unlink()
    (pairs / "dev.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": "z\\ud800", "a": "z"}\n')
    output = tmp_path / "rows.jsonl"
    arguments = ["--task=supervised", f"--source={pairs}", "--fields=inputs=q,targets=a", "--prefix=> "]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *arguments, f"--output={output}"])
    with pytest.raises(SystemExit) as exit:
        run(tasks.main)
    assert exit.value.code == 0, capsys.readouterr().err
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"inputs": "> x", "answers": ["y"]},
        {"inputs": "> z?", "answers": ["z"]},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "rows.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "cnn_dailymial"}, "task='cnn_dailymial' is unknown; .*; nearest: cnn_dailymail"),
        ({"source": "nowhere.jsonl"}, "source 'nowhere.jsonl' not found"),
        ({"source": None}, "task supervised needs a source"),
        ({"fields": {"inputs": "q"}}, "fields=.*; expected the columns of inputs and targets"),
        ({"fields": {"inputs": "q", "targets": "b"}}, r"train.csv has no column 'b' among q, a; nearest: q"),
        ({"targets_length": None}, "targets_length=None holds no target of supervised"),
        ({"inputs_length": None}, "task supervised needs an inputs_length"),
        ({"inputs_length": 0, "task": "cnn_dailymail"}, "inputs_length=0 is too short; expected 8 or more"),
        ({"task": "causal_lm", "fields": None}, "prefix='' has no meaning for task causal_lm"),
    ],
)
def test_impossible_tasks_are_refused(changes, message, pairs, tiny_vocabulary, tmp_path):
    spec = dict(task="supervised", source=str(pairs), vocabulary=str(tiny_vocabulary), inputs_length=16)
    spec |= dict(targets_length=8, fields={"inputs": "q", "targets": "a"}, prefix="") | changes
    with pytest.raises(InputError, match=message):
        prepare(PrepareSpec(**spec), tmp_path / "records")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_examples_name_the_splits_that_there_are(pairs):
    with pytest.raises(InputError, match="task supervised has no split 'test'; expected one of train, heldout"):
        tasks.examples("supervised", "test", source=str(pairs), fields={"inputs": "q", "targets": "a"})
    with pytest.raises(InputError, match="task causal_lm has no inputs and targets"):
        tasks.examples("causal_lm", "train", source=str(pairs))
