"""Every filter of a row, on texts that show what it sees."""

import dataclasses
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from gqa.command_line import load_config
from gqa.data.cleaning import Cleaner, parse
from gqa.data.duplicates import DuplicateFilter, Duplicates, Signatures, evaluation_sets
from gqa.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs" / "cleaning"
NOTHING = np.zeros(0, np.uint64)
PROSE = (
    "The house stood at the end of a long road that led down to the sea, and in the evening the windows were lit. "
    "Nobody had lived there for years, but the garden was kept by an old man who came twice a week with his dog. "
    "He said that he had promised it to someone, and that a promise does not end because a person has gone away."
)
OFF = dict(
    repair=False,
    collapse_spaces=False,
    **dict.fromkeys(
        "min_characters max_characters min_words max_words min_mean_word_length max_mean_word_length "
        "max_symbols_per_word max_bullet_lines max_ellipsis_lines min_alphabetic_words min_stop_words "
        "max_duplicate_lines max_duplicate_line_characters max_duplicate_paragraphs "
        "max_duplicate_paragraph_characters".split()
    ),
    **dict.fromkeys("max_top_ngrams max_duplicate_ngrams blocked blocked_files languages".split(), ()),
    max_blocked=0,
    min_language_probability=0.0,
)
NO_DUPLICATES = dict(exact=False, near=False, similarity=0.5, ngram=3, permutations=16)
NO_PAIR = dict.fromkeys("min_compression max_compression min_similarity max_similarity".split())


def of_text(**changes):
    return parse(
        dict(text=OFF | changes, duplicates=NO_DUPLICATES, contamination=dict(ngram=3, max_share=0.0), order=None)
    )


def of_pair(pair=NO_PAIR, **changes):
    sides = dict(inputs=OFF | changes, targets=OFF | changes, pair=pair)
    return parse(sides | dict(duplicates=NO_DUPLICATES, contamination=dict(ngram=3, max_share=0.0), order=None))


def rejection(text, **changes):
    return Cleaner(of_text(**changes), NOTHING).clean({"text": text}).rejection


@pytest.mark.parametrize(
    ("changes", "text", "expected"),
    [
        ({}, " \n", ("empty", "no text")),
        ({"min_characters": 4}, "abc", ("length", "3 characters; expected 4 or more")),
        ({"max_characters": 2}, "abc", ("length", "3 characters; expected at most 2")),
        ({"min_words": 2, "max_words": 3}, "a b c d", ("length", "4 words; expected 2 to 3")),
        ({"min_mean_word_length": 3.0}, "a bb ccc", ("words", "2 characters a word; expected 3.0 or more")),
        ({"max_mean_word_length": 1.5}, "a bb ccc", ("words", "2 characters a word; expected at most 1.5")),
        ({"min_alphabetic_words": 0.8}, "a 1 2 c4", ("words", "0.5 of the words with a letter; expected 0.8 or more")),
        ({"min_stop_words": 2}, "The dog, the cat", ("words", "1 kinds of stop words; expected 2 or more")),
        ({"max_symbols_per_word": 0.1}, "#a #b c d", ("symbols", "0.5 # a word; expected at most 0.1")),
        ({"max_symbols_per_word": 0.1}, "a... b… c d", ("symbols", "0.5 ellipses a word; expected at most 0.1")),
        (
            {"max_bullet_lines": 0.5},
            "• a\n\n- b\nc",
            ("symbols", "0.667 of the lines with a bullet; expected at most 0.5"),
        ),
        (
            {"max_ellipsis_lines": 0.5},
            "a …\nb...\nc",
            ("symbols", "0.667 of the lines end with an ellipsis; expected at most 0.5"),
        ),
        (
            {"max_duplicate_lines": 0.4},
            "a\nb\na\na",
            ("repetition", "0.5 of the lines stood before; expected at most 0.4"),
        ),
        (
            {"max_duplicate_line_characters": 0.4},
            "aaaa\nb\naaaa",
            ("repetition", "0.444 of the characters are in lines that stood before; expected at most 0.4"),
        ),
        (
            {"max_duplicate_paragraphs": 0.3},
            "a\nb\n\nc\n\na\nb",
            ("repetition", "0.333 of the paragraphs stood before; expected at most 0.3"),
        ),
        (
            {"max_duplicate_paragraph_characters": 0.4},
            "a\nb\n\nc\n\na\nb",
            ("repetition", "0.429 of the characters are in paragraphs that stood before; expected at most 0.4"),
        ),
        (  # "a b" three times of 8 characters
            {"max_top_ngrams": (0.7,)},
            "a b a b c d a b",
            ("repetition", "0.75 of the characters are in the most frequent 2-gram; expected at most 0.7"),
        ),
        (  # the second "a b c d e" of 11 words; the overlapping "b c d e f" counts its last word alone
            {"max_duplicate_ngrams": (0.5,)},
            "a b c d e f a b c d e f",
            ("repetition", "0.5 of the characters are in 5-grams that stood before; expected at most 0.4"),
        ),
        (
            {"blocked": ("Lorem", "as an AI"), "max_blocked": 1},
            "As an AI, lorem… as an ai!",
            ("blocked words", "3 blocked, such as 'lorem'"),
        ),
        ({"languages": ("de", "fr")}, PROSE, ("language", "en (1.00); expected de or fr")),
        (
            {"languages": ("en",), "min_language_probability": 1.1},
            PROSE,
            ("language", "en with 1.00; expected 1.1 or more"),
        ),
    ],
)
def test_what_a_filter_rejects(changes, text, expected):
    if "5-grams" in expected[1]:
        changes = {"max_duplicate_ngrams": (0.4,)}
    assert rejection(text, **changes) == expected
    if changes:
        assert rejection(text) is None


def test_what_a_filter_lets_pass():
    limits = dict(
        min_characters=300,
        min_words=60,
        max_words=80,
        min_stop_words=2,
        max_symbols_per_word=0.0,
        max_duplicate_lines=0.0,
        max_top_ngrams=(0.2, 0.18, 0.16),
        max_duplicate_ngrams=(0.0,),
        blocked=("sea side", "windowsill"),
        languages=("en",),
        min_language_probability=0.9,
    )
    assert rejection(PROSE, **limits) is None


def test_a_shipped_config_keeps_prose_and_a_pair():
    text = Cleaner(parse(load_config(CONFIGS / "text.py")), NOTHING)
    assert text.clean({"text": PROSE}).rejection is None
    assert text.clean({"text": "Click here!"}).rejection == ("length", "2 words; expected 50 to 100000")
    pairs = Cleaner(parse(load_config(CONFIGS / "instructions.py")), NOTHING)
    question = {"inputs": "What is the capital of France?", "targets": "Paris."}
    assert pairs.clean(question).rejection is None
    refusal = question | {"targets": "As an AI language model, I cannot know."}
    assert pairs.clean(refusal).rejection == ("targets: blocked words", "1 blocked, such as 'as an ai language model'")
    summaries = Cleaner(parse(load_config(CONFIGS / "summaries.py")), NOTHING)
    assert summaries.clean({"inputs": PROSE, "targets": "An old man keeps a garden by the sea."}).rejection is None


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("schÃ¶n", "schön"),  # UTF-8 that was read as Latin-1
        ("AT&amp;T and “quotes”", "AT&T and “quotes”"),
        ("<p>AT&amp;T</p>", "<p>AT&amp;T</p>"),  # of HTML they are meant
        ("e\u0301te\u0301", "été"),
        ("a\r\nb \t\rc\u2028d\n\n", "a\nb\nc\nd"),
        ("a\x00\x1b[31mb\ufeff", "ab"),
        ("    x = 1\n", "    x = 1"),
    ],
)
def test_repair(text, repaired):
    cleaned = Cleaner(of_text(repair=True), NOTHING).clean({"text": text})
    assert (cleaned.row, cleaned.repaired) == ({"text": repaired}, repaired != text)


def test_spaces_collapse():
    cleaned = Cleaner(of_text(collapse_spaces=True), NOTHING).clean({"text": " a \t b\u00a0c \n\n\n\n d"})
    assert cleaned.row == {"text": "a b c\n\nd"}


def test_blocked_words_of_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("spam\n\nbuy now\n")
    assert rejection("Please BUY   now", blocked_files=(str(tmp_path / "words.txt"),))[0] == "blocked words"
    with pytest.raises(InputError, match=r"blocked_files has 'none\.txt', which is not there"):
        rejection("a", blocked_files=("none.txt",))


@pytest.mark.parametrize(
    ("limit", "inputs", "targets", "expected"),
    [
        (
            {"min_compression": 2.0},
            "a b c",
            "a b",
            ("compression ratio", "1.5 words of inputs for each of targets; expected 2.0 or more"),
        ),
        (
            {"max_compression": 2.0},
            "a b c",
            "d",
            ("compression ratio", "3 words of inputs for each of targets; expected at most 2.0"),
        ),
        (
            {"max_similarity": 0.5},
            "What is it?",
            "It is what?",
            ("similarity", "1 of the words are in both; expected at most 0.5"),
        ),
        (
            {"min_similarity": 0.3},
            "a b c",
            "c d e",
            ("similarity", "0.2 of the words are in both; expected 0.3 or more"),
        ),
    ],
)
def test_what_a_filter_of_pairs_rejects(limit, inputs, targets, expected):
    row = {"inputs": inputs, "targets": targets}
    assert Cleaner(of_pair(NO_PAIR | limit), NOTHING).clean(row).rejection == expected
    assert Cleaner(of_pair(), NOTHING).clean(row).rejection is None


def test_each_side_of_a_pair_has_filters_of_its_own():
    config = of_pair()
    config = dataclasses.replace(config, targets=dataclasses.replace(config.targets, min_words=2))
    rows = [{"inputs": "a", "targets": "b c", "kept id": "7"}, {"inputs": "a b", "targets": "c"}]
    kept, dropped = (Cleaner(config, NOTHING).clean(row) for row in rows)
    assert kept.rejection is None and kept.row == rows[0]
    assert dropped.rejection == ("targets: length", "1 words; expected 2 or more")


def test_copies_are_of_the_whole_text_but_for_case_and_blanks():
    """Operators, punctuation and emoji count; texts without words are alike where they are the same."""
    filters = DuplicateFilter(exact=True, near=False, similarity=0.8, ngram=3, permutations=128)
    texts = [
        "Is C++ fast?",
        "Is C# fast?",
        "is  c++\nFAST?",
        "int x = 1;",
        "int x = -1;",
        "le caf\u00e9",
        "Le cafe\u0301",
    ]
    assert [found and found[1] for found in rejections(texts, filters)] == [
        *(None, None, "of 0"),
        *(None, None),
        *(None, "of 5"),
    ]
    wordless = ["\U0001f600", "\U0001f389 !!", "\U0001f600", "..."]
    near = dataclasses.replace(filters, near=True)
    assert rejections(wordless, near) == [None, None, ("exact duplicate", "of 0"), None]
    assert rejections(["one two three", "one two, three"], near) == [None, ("near duplicate", "1.00 alike 0")]


def rejections(texts, filters):
    duplicates = Duplicates(filters)
    return [duplicates.rejection(str(i), Signatures.of(text, filters, False)) for i, text in enumerate(texts)]


def test_contamination_is_what_shares_words_in_a_row_with_an_evaluation_set(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"q": "Who wrote the book?", "answers": ["an old man", "x"], "id": 3}\n')
    known, *counts = evaluation_sets([tmp_path / "test.jsonl"], 3)
    assert counts == [3, 1] and len(known) == 3  # who wrote the, wrote the book, an old man
    cleaner = Cleaner(of_text(), known)
    assert cleaner.clean({"text": "They say, who wrote it? An old woman."}).rejection is None
    found = cleaner.clean({"text": "I ask: who WROTE the book of"}).rejection
    assert found == ("contamination", "57% of the words are in an evaluation set")
    lenient = dataclasses.replace(of_text(), contamination=dataclasses.replace(of_text().contamination, max_share=0.6))
    assert Cleaner(lenient, known).clean({"text": "I ask: who WROTE the book of"}).rejection is None
    with pytest.raises(InputError, match="has no text of 9 words"):
        evaluation_sets([tmp_path / "test.jsonl"], 9)


def test_contamination_shows_whatever_the_encoding_of_accents_and_of_the_file(tmp_path):
    text = "le café était fermé"
    (tmp_path / "test.json").write_text(json.dumps([unicodedata.normalize("NFD", text), {"q": "où"}]))
    known, *counts = evaluation_sets([tmp_path / "test.json"], 3)
    assert counts == [2, 1] and len(known) == 2
    found = Cleaner(of_text(), known).clean({"text": text}).rejection
    assert found == ("contamination", "100% of the words are in an evaluation set")
    (tmp_path / "test.json").write_text('{"q": "a"}\n{"q": "b"}\n')
    with pytest.raises(InputError, match=r"test.json is no JSON \(.*\); expected an array .*; nearest: .jsonl"):
        evaluation_sets([tmp_path / "test.json"], 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_words": -1}, "cleaning: min_words=-1; expected 0 or more"),
        ({"max_ellipsis_lines": float("nan")}, "cleaning: max_ellipsis_lines=nan; expected 0 or more"),
        ({"min_wrods": 1}, "config.text: unknown 'min_wrods'; .* nearest: min_words"),
        ({"min_words": "many"}, "config.text.min_words='many' is a str; expected int or None"),
    ],
)
def test_a_config_that_says_nothing_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        of_text(**changes)


def test_sides_and_languages_that_are_not_there_are_refused():
    config = dict(duplicates=NO_DUPLICATES, contamination=dict(ngram=3, max_share=0.0))
    with pytest.raises(InputError, match="cleaning has filters of nothing; expected text, or inputs and targets"):
        parse(config)
    with pytest.raises(InputError, match="cleaning has filters of inputs; expected text, or inputs and targets"):
        parse(config | dict(inputs=OFF))
    with pytest.raises(InputError, match="order='random'; expected similarity, or None"):
        parse(config | dict(text=OFF, order="random"))
    with pytest.raises(InputError, match=r"language 'english' is not known; expected some of .*, en, "):
        Cleaner(of_text(languages=("english",)), NOTHING)
