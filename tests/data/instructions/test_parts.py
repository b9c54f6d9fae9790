"""What the programs share: seeds of every form, tags, what is a near-copy."""

import json

import pytest

from gqa.data.instructions.parts import NearCopies, Rejected, Seed, plain, read_seeds, tagged
from gqa.errors import InputError

NEAR = NearCopies(similarity=0.6, distance=9)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<a>one</a> and\n<a> two\nlines </a>", ["one", "two\nlines"]),
        ("no tags at all", [Rejected("no <a>")]),
        ("<b>of another kind</b>", [Rejected("no <a>")]),
        ("<a>one</a><a>cut off", ["one", Rejected("unclosed <a>")]),
        ("<a>one <a>two</a>", [Rejected("unclosed <a>"), "two"]),
        ("one</a><a>two</a>", [Rejected("unopened </a>"), "two"]),
        ("<a> \n </a>", [Rejected("empty <a>")]),
    ],
)
def test_tags(text, found):
    assert list(tagged(text, "a")) == found


@pytest.mark.parametrize(
    ("text", "seed", "is_copy"),
    [
        # 5 edits of 31 characters.
        ("Write a poem about a green tree.", "Write a poem about a grey tree.", True),
        # 9 edits; the ratio is 2 x 20 / (20 + 29) = 0.82.
        ("Write a short story.", "Write a short story for kids.", True),
        # 10 edits: as similar as the last one, but one letter more was added.
        ("Write a short story.", "Write a short story for Katie.", False),
        # 3 edits of words without a letter in common.
        ("Run", "Add", False),
        # 6 edits; common "o a" in both: 2 x 4 / 16 = 0.5.
        ("Go afar!!", "To a bit", False),
    ],
)
def test_near_copies(text, seed, is_copy):
    assert NEAR.one_of(plain(text), [plain("Something else that stands before it."), plain(seed)]) is is_copy


def test_limits_of_near_copies():
    with pytest.raises(InputError, match=r"near_copies.similarity=1\.5; expected a ratio"):
        NearCopies(1.5, 9)
    with pytest.raises(InputError, match=r"near_copies.distance=-1; expected 0 or more"):
        NearCopies(0.6, -1)


@pytest.fixture
def read(tmp_path):
    """A function (rows) -> the seeds."""

    def read(*rows):
        path = tmp_path / "seeds.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_seeds(path)

    return read


def test_every_form_of_a_seed(read):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello. "},
        {"role": "user", "content": "Bye"},
    ]
    found = read(
        {"messages": messages},
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "submixture": "cot"},
        {"prompt": "Why?"},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": messages[:2]},
    )
    assert found == [
        Seed(1, "Hi", "Hello.", None),
        Seed(2, "Add.\n\n1 and 2", "3", "cot"),
        Seed(3, "Why?", None, None),
        Seed(4, "Why?", "So.", None),
        Seed(5, "Hi", None, None),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 2: there is no 'instruction' among text"),
        ({"prompt": " "}, "line 2: the instruction is empty"),
        ({"prompt": 3}, "line 2: there are no messages"),
        ({"prompt": "x", "submixture": 1}, "line 2: submixture is a int; expected a text"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "line 2: message 1 has role 'bot'"),
    ],
)
def test_seeds_that_are_refused(read, row, message):
    with pytest.raises(InputError, match=message):
        read({"prompt": "good"}, row)


def test_no_seeds(read):
    with pytest.raises(InputError, match="is empty; expected seeds"):
        read()
    with pytest.raises(InputError, match=r"has no usable seeds \(1 empty response\); expected seeds"):
        read({"instruction": "Add.", "output": " "})


def test_seeds_with_an_empty_response_are_left_out_and_counted(read, capsys):
    assert read({"instruction": "Add.", "output": " "}, {"prompt": "Why?"}) == [Seed(2, "Why?", None, None)]
    assert capsys.readouterr().err.endswith("seeds.jsonl: left out 1 empty response\n")
