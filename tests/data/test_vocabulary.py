import argparse
import csv
import inspect
import json
import json.decoder
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.data import vocabulary as vocabulary_module
from gqa.data.vocabulary import Vocabulary, train
from gqa.errors import InputError

SHIPPED = Path(__file__).parents[2] / "assets" / "vocabulary" / "python_4096.model"
VOCABULARY = Vocabulary(SHIPPED)


def test_special_ids_are_those_of_t5():
    assert VOCABULARY.size == 4096
    assert (VOCABULARY.pad_id, VOCABULARY.eos_id, VOCABULARY.unk_id) == (0, 1, 2)
    assert VOCABULARY.sentinel_id(0) == 4095
    assert VOCABULARY.sentinel_id(99) == 3996
    assert sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED)).GetPieceSize() == 3996
    with pytest.raises(ValueError, match="index=100"):
        VOCABULARY.sentinel_id(100)


def test_indentation_and_line_ends_are_single_tokens():
    assert len(VOCABULARY.encode("\n        ")) == 1
    assert len(VOCABULARY.encode("\n\n")) == 1
    assert [VOCABULARY.decode([token]) for token in VOCABULARY.encode("def f(self):\n    return None\n")] == [
        "def",
        " f",
        "(self):",
        "\n    ",
        "return",
        " None",
        "\n",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "    leading and  double  spaces \n\t\ttabs\r\n\n\n\n\n",
        "naïve = '日本語 \U0001f600'\x00",
        "a \u2581 b\u2581",  # the character that SentencePiece writes for a space
        "<unk> </s> <pad> <0x41> <extra_id_0>",
        "\u2028\u00a0\ufeff",
    ],
)
def test_round_trip_is_lossless(text):
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


def test_round_trip_of_python_source_is_lossless():
    for module in (argparse, inspect, json.decoder):
        text = Path(module.__file__).read_text(encoding="utf-8")
        ids = VOCABULARY.encode(text)
        assert VOCABULARY.decode(ids) == text
        assert len(ids) < len(text) / 2


@settings(deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8")))
def test_round_trip_of_any_text_is_lossless(text):
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


def test_sentinels_in_text_are_read_only_when_asked():
    text = "def f(<extra_id_0>):<extra_id_12>"
    ids = VOCABULARY.encode_with_sentinels(text)
    assert ids == [
        *VOCABULARY.encode("def f("),
        4095,
        *VOCABULARY.encode("):"),
        4083,
    ]
    assert VOCABULARY.decode(ids) == text
    assert 4095 not in VOCABULARY.encode(text)


USER_DEFINED, NORMAL = b"\x18\x04", b""  # how SentencePiece's file says a piece's type


def with_sentinels(path: Path, names: list[str], piece_type: bytes = USER_DEFINED) -> Path:
    """The shipped file with further pieces."""
    entries = (b"\n" + bytes([len(name.encode())]) + name.encode() + b"\x15\0\0\0\0" + piece_type for name in names)
    path.write_bytes(SHIPPED.read_bytes() + b"".join(b"\n" + bytes([len(entry)]) + entry for entry in entries))
    return path


@pytest.mark.parametrize(("space", "piece_type"), [("", USER_DEFINED), ("\u2581", USER_DEFINED), ("\u2581", NORMAL)])
def test_a_file_that_ends_with_the_sentinels_gets_no_others(space, piece_type, tmp_path):
    """As mT5's does."""
    names = [f"{space}<extra_id_{i}>" for i in reversed(range(100))]
    path = with_sentinels(tmp_path / "mt5.model", names, piece_type)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = Vocabulary(path)
    assert found.size == own.GetPieceSize() == 4096
    assert [found.sentinel_id(0), found.sentinel_id(99)] == [own.PieceToId(names[i]) for i in (-1, 0)] == [4095, 3996]
    for text in ("a <extra_id_0> b<extra_id_12>", "x = 1\n"):
        assert found.encode(text) == VOCABULARY.encode(text)  # text, although the file alone reads a sentinel
        ids = found.encode_with_sentinels(text)
        assert ids == VOCABULARY.encode_with_sentinels(text) and found.decode(ids) == text
    with pytest.raises(InputError, match="has <extra_id_0>, but not all 100 sentinels of T5 as last ids"):
        Vocabulary(with_sentinels(path, names[1:] + names[:1]))


def test_decode_leaves_out_padding_and_eos():
    assert VOCABULARY.decode([*VOCABULARY.encode("x = 1"), 1, 0, 0]) == "x = 1"
    with pytest.raises(ValueError, match="token id 4096"):
        VOCABULARY.decode([4096])


def test_halves_of_surrogate_pairs_are_question_marks():
    found = VOCABULARY.encode_all(["a \ud800", "\udfff\u2581b"], num_threads=1)
    assert list(map(VOCABULARY.decode, found)) == ["a ?", "?\u2581b"]


def test_threads_do_not_change_the_ids():
    texts = ["import os\n", "", "x \u2581", "y = 2"]
    assert [ids.tolist() for ids in VOCABULARY.encode_all(texts, num_threads=3)] == list(map(VOCABULARY.encode, texts))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_gives_the_size_asked_for_and_the_same_bytes(kind, tmp_path):
    source = tmp_path / "source.txt"
    source.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("a.model", "b.model"):
        train(str(source), 600, kind, tmp_path / name)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    vocabulary = Vocabulary(tmp_path / "a.model")
    assert vocabulary.size == 600
    assert vocabulary.decode(vocabulary.encode("if x:\n    é")) == "if x:\n    é"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A vocabulary of Llama's kind, of the messages of conversations."""
    folder = tmp_path_factory.mktemp("llama")
    lines = Path(argparse.__file__).read_text(encoding="utf-8").split("\n\n")
    rows = [{"instruction": f"Explain {line}", "output": line} for line in lines if line.strip()]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(str(folder / "chats.jsonl"), 600, "llama", folder / "tokenizer.model", task="sft")
    return Vocabulary(folder / "tokenizer.model", foreign=True)


def test_llama_has_its_own_special_ids_single_digits_and_bytes(llama):
    assert (llama.size, llama.unk_id, llama.bos_id, llama.eos_id, llama.pad_id) == (600, 0, 1, 2, -1)
    assert llama.special_ids == {"<s>": 1, "</s>": 2}
    assert [llama.decode([token]) for token in llama.encode("self 2026")][-4:] == ["2", "0", "2", "6"]
    assert llama.encode("日")[-3:] == [3 + 0xE6, 3 + 0x97, 3 + 0xA5]  # bytes follow on the special pieces
    with pytest.raises(InputError, match=r"has pad, eos, unk = \(-1, 2, 0\); expected T5's"):
        Vocabulary(llama.path)


@pytest.mark.parametrize("text", ["", " ", "a", "  if x:\n\t\treturn  1\n", "a \u2581 b\u2581c", "日本\x00 </s>"])
def test_round_trip_with_a_space_before_a_text(llama, text):
    assert llama.decode(llama.encode(text)) == text
    before = llama.encode("def f")
    assert llama.decode([*before, *llama.encode(text, continued=True)]) == "def f" + text


def test_training_reads_tables(tmp_path):
    """Of both columns, and of all rows of a large table."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    with (tmp_path / "qa.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "id", "answer"])
        writer.writerows([f"{line} zebra", "xylophone", "walrus " * 9] for line in text.split("\n"))
    fields = {"inputs": "question", "targets": "answer"}
    train(str(tmp_path / "qa.csv"), 700, "bpe", tmp_path / "x.model", task="supervised", fields=fields)
    vocabulary = Vocabulary(tmp_path / "x.model")
    assert [len(vocabulary.encode(word)) for word in (" zebra", "walrus")] == [1, 1]
    assert len(vocabulary.encode("xylophone")) > 2
    fields["targets"] = "asnwer"
    with pytest.raises(InputError, match=r"qa.csv has no column 'asnwer' among question, id, answer; nearest: answer"):
        train(str(tmp_path / "qa.csv"), 700, "bpe", tmp_path / "y.model", task="supervised", fields=fields)
    assert not (tmp_path / "y.model").exists()


def test_every_so_many_rows_of_a_large_table(tmp_path, monkeypatch):
    rows = [{"text": f"{'abc'[i // 400]}bcdefgh ijklm {i}"} for i in range(1200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = []
    monkeypatch.setattr(vocabulary_module, "TRAINING_CHARACTERS", 4000)
    monkeypatch.setattr(
        sentencepiece.SentencePieceTrainer, "Train", lambda sentence_iterator, **_: lines.extend(sentence_iterator)
    )
    train(str(tmp_path / "rows.jsonl"), 700, "bpe", tmp_path / "x.model")
    assert {line[0] for line in lines} == set("abc") and 100 < len(lines) < 300


@pytest.mark.parametrize(
    "text", ["".join(f"word{i} " for i in range(3000)).strip(), "日本語の文" * 2000, "x" * 9000 + " é"]
)
def test_lines_that_are_too_long_for_sentencepiece_are_cut(text, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(30)))
    lines = []
    monkeypatch.setattr(
        sentencepiece.SentencePieceTrainer, "Train", lambda sentence_iterator, **_: lines.extend(sentence_iterator)
    )
    train(str(tmp_path / "rows.jsonl"), 700, "bpe", tmp_path / "x.model")
    assert all(len(line.encode()) < 4192 for line in lines)
    separator = "" if text[0] == "日" else " "
    rows = separator.join(lines)
    number_of_rows = rows.count(text.removeprefix("x" * 9000).strip())
    assert 25 < number_of_rows < 30 and "xx" not in rows


def test_impossible_sizes_are_refused(corpus_folder, tmp_path):
    with pytest.raises(InputError, match="size=300 is too small"):
        train(str(corpus_folder), 300, "unigram", tmp_path / "x.model")
    (tmp_path / "rich.py").write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match=r"size=90000 does not suit source .*; expected 477 to (\d+)$") as caught:
        train(str(tmp_path / "rich.py"), 90000, "bpe", tmp_path / "x.model")
    (tmp_path / "poor.jsonl").write_text("".join(f'{{"text": "word {i}"}}\n' for i in range(40)))
    with pytest.raises(InputError, match=r"which has text for \d+ ids; expected more text, for 477 or more$"):
        train(str(tmp_path / "poor.jsonl"), 90000, "bpe", tmp_path / "x.model")
    assert not list(tmp_path.glob("*.model"))
    train(str(tmp_path / "rich.py"), int(caught.value.args[0].split()[-1]), "bpe", tmp_path / "x.model")


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="not found"):
        Vocabulary(tmp_path / "missing.model")
    for content in (b"", b"not a model", SHIPPED.read_bytes()[:20000]):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(InputError, match="no whole SentencePiece model"):
            Vocabulary(tmp_path / "broken.model")
