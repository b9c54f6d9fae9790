"""Prompts of a file: what they are, which are held out, what is refused."""

import json
import re

import pytest

from gqa.data.conversations import Conversations
from gqa.data.templates import Template
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError
from gqa.posttraining.prompts import held_out, read_prompts


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def read(tmp_path, tiny_vocabulary):
    """A function (rows, most tokens) -> the prompts."""
    template = Template("human_bot", Vocabulary(tiny_vocabulary, foreign=True))

    def read(rows, max_tokens=40):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts(path, template, max_tokens)

    read.template = template
    return read


def test_every_form_of_a_line(read, capsys):
    answer = {"role": "assistant", "content": "4"}
    rows = [
        {"prompt": "add 1"},
        {"prompt": [user("add 2")], "chosen": "x", "rejected": "y", "safety": True},
        {"messages": [user("add 3"), answer]},
        {"messages": [user("add 3"), answer, user("add 4")]},
        {"instruction": "add 5", "output": "6"},
        {"instruction": "add 1", "system": "be nice"},
        {"prompt": "add 1", "chosen": "another pair"},
    ]
    prompts = read(rows, 100)
    messages = [
        [user("add 1")],
        [user("add 2")],
        [user("add 3")],
        [user("add 3"), answer, user("add 4")],
        [user("add 5")],
        [{"role": "system", "content": "be nice"}, user("add 1")],
    ]
    assert [prompt.messages for prompt in prompts] == messages
    assert [prompt.line for prompt in prompts] == [1, 2, 3, 4, 5, 6]
    assert [prompt.is_safety for prompt in prompts] == [False, True, False, False, False, False]
    assert prompts[3].tokens == read.template.prompt(messages[3])
    assert "1 prompts are there before; they are left out" in capsys.readouterr().err


def test_long_prompts_are_left_out_and_named(read, capsys):
    assert [prompt.line for prompt in read([{"prompt": "x"}, {"prompt": "x" * 50}, {"prompt": "y" * 60}])] == [1]
    expected = r"2 prompts have more than inputs_length=40 tokens, the first: line 2 has \d\d; they are left out"
    assert re.search(expected, capsys.readouterr().err)
    with pytest.raises(InputError, match=r"1 prompts have more than .*: line 1 has \d\d; none is left"):
        read([{"prompt": "x" * 50}])


def test_conversations_with_an_empty_response_are_left_out_and_counted(read, capsys):
    empty = {"messages": [user("add 1"), {"role": "assistant", "content": " "}, user("add 2")]}
    assert [prompt.line for prompt in read([empty, {"prompt": "x"}])] == [2]
    assert "prompts.jsonl: left out 1 empty response" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"has no usable prompts \(1 empty response\); expected prompts"):
        read([empty])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "  "}, "line 2: the prompt is empty; expected some text"),
        ({"prompt": 3}, "line 2: there are no messages"),
        ({"text": "x"}, "line 2: there is no 'prompt' among text; expected prompt, messages or instruction"),
        ({"prompt": "x", "safety": 1}, "line 2: safety is 1; expected true or false"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "line 2: message 1 has role 'bot'"),
    ],
)
def test_lines_that_are_refused(read, row, message):
    with pytest.raises(InputError, match=message):
        read([{"prompt": "good"}, row])


def test_no_prompt_is_on_both_sides(read, tmp_path):
    """And those of preferences are the ones that SFT and a reward model do not see."""
    rows = [{"prompt": f"add {number}", "chosen": "y", "rejected": "n"} for number in range(200)]
    prompts = read(rows)
    train, heldout = held_out(prompts, 20)
    assert len(heldout) == 20 and len(train) == 180
    assert not {prompt.line for prompt in train} & {prompt.line for prompt in heldout}
    for task in ("preferences", "sft"):
        unseen = Conversations(str(tmp_path / "prompts.jsonl"), task).names("heldout")
        assert {int(line) for line in unseen} <= {prompt.line for prompt in heldout}
    with pytest.raises(InputError, match=r"train\.heldout=101 of 200 prompts; expected at most half: 100"):
        held_out(prompts, 101)


def test_prompts_that_begin_alike_are_on_one_side(read):
    said = [user("add 1"), {"role": "assistant", "content": "2"}]
    prompts = read([{"messages": [*said, user(f"and {number}")]} for number in range(4)] + [{"prompt": "b"}], 80)
    train, heldout = held_out(prompts, 2)
    assert not {prompt.messages[0]["content"] for prompt in train} & {
        prompt.messages[0]["content"] for prompt in heldout
    }
    with pytest.raises(InputError, match="of 4 prompts leaves none: they all begin alike"):
        held_out(prompts[:4], 2)
