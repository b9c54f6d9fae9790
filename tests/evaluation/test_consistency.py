"""How long an instruction holds: rules, literal dialogues, the command, and lines that are refused."""

import json
import sys
import types

import jax
import pytest

from gqa import command_line, evaluate, models
from gqa.checkpoints import hf
from gqa.data.templates import Template
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError
from gqa.evaluation.consistency import Dialogue, Rule, Share, check_template, hold, read_dialogues, shares, table

POSITIONS, NEW = 160, 2
ROW = {"instruction": "say x", "turns": ["hi", "and", "so"], "rule": {"contains": ["x", "y"]}}


@pytest.mark.parametrize(
    ("rule", "response", "holds"),
    [
        (Rule(contains=("Napoleon",)), "I am NAPOLEON.", True),
        (Rule(contains=("Napoleon",)), "Napoleonic wars", False),
        (Rule(contains=("emperor", "Josephine my  love")), "Ah, Josephine\nmy love!", True),
        (Rule(contains=("C++",)), "I write C++.", True),
        (Rule(contains=("?",)), "Who are you?", True),
        (Rule(contains=("😀",)), "Hi😀", True),
        (Rule(contains=("拿破仑",)), "我是拿破仑皇帝", True),
        (Rule(contains=("Napoleon",)), "我是Napoleon。", True),
        (Rule(lacks=("!",)), "Hello there!", False),
        (Rule(lacks=("...",)), "Well...", False),
        (Rule(lacks=("sorry",)), "Of course.", True),
        (Rule(lacks=("sorry",)), "Sorry, no.", False),
        (Rule(max_words=3), "one two three", True),
        (Rule(max_words=3), "one two three four", False),
        (Rule(contains=("wren",), lacks=("owl",)), "A wren and an owl.", False),
        (Rule(lacks=("sorry",)), " \n", False),
    ],
)
def test_rules(rule, response, holds):
    assert rule.holds(response) is holds


def test_literal_dialogues():
    rule = Rule(contains=("x",))
    dialogues = [Dialogue(number, "say x", ("a", "b", "c")[:turns], rule) for number, turns in enumerate((3, 2, 3))]
    # The third has no room for its second turn.
    said = [["x", "x", "no"], ["x", "no"], ["no", None]]
    asked = []

    def respond(turn, conversations):
        asked.append(conversations)
        return {number: said[number][turn] for number in conversations}

    held = hold(dialogues, respond)
    assert [each.obeyed for each in held] == [[True, True, False], [True, False], [False]]
    assert [list(each) for each in asked] == [[0, 1, 2], [0, 1, 2], [0]]
    # The instruction is in the first turn only, the responses are the model's own.
    assert [message["content"] for message in asked[2][0]] == ["say x\n\na", "x", "b", "x", "c"]
    assert [message["content"] for message in held[2].messages] == ["say x\n\na", "no"]
    found = shares(held)
    assert found == [Share(2 / 3, 3), Share(1 / 2, 2), Share(0.0, 1)]
    assert table({"with": found, "without": found[:1]}) == (
        "| turn | with | without |\n|--:|--:|--:|\n"
        "| 1 | 67% of 3 | 67% of 3 |\n| 2 | 50% of 2 |  |\n| 3 | 0% of 1 |  |\n"
    )


def test_after_an_empty_response_nothing_is_obeyed():
    (held,) = hold([Dialogue(1, "say x", ("a", "b", "c"), Rule(contains=("x",)))], lambda turn, _: {0: ("x", "")[turn]})
    assert held.obeyed == [True, False, False] and len(held.messages) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": []}, r"line 2: turns is \[\]; expected a list of texts"),
        ({"turns": "hi"}, "line 2: turns is 'hi'"),
        ({"instruction": " "}, "line 2: instruction is ' '; expected a text"),
        ({"rule": {}}, "line 2: rule is {}; expected an object with contains, lacks, max_words"),
        ({"rule": {"contain": ["x"]}}, "line 2: rule 'contain'; expected one of .*; nearest: contains"),
        ({"rule": {"contains": "x"}}, "line 2: rule contains is 'x'; expected a list of texts"),
        ({"rule": {"max_words": 0}}, "line 2: rule max_words is 0; expected a number of 1 or more"),
    ],
)
def test_lines_that_are_refused(tmp_path, changes, message):
    path = tmp_path / "dialogues.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | changes)}\n")
    with pytest.raises(InputError, match=message):
        read_dialogues(path)
    path.write_text(json.dumps({"instruction": "x", "turn": ["x"], "rule": {}}))
    with pytest.raises(
        InputError, match="line 1: there is no 'turns'; expected instruction, turns and rule; nearest: turn"
    ):
        read_dialogues(path)


@pytest.fixture(scope="module")
def checkpoint(tiny_run, tiny_vocabulary, tmp_path_factory):
    """A decoder of random weights; many ids end its responses."""
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    changes = {**tiny_run("llama").model.changes, "num_layers": 1, "max_position": POSITIONS}
    architecture = tiny_run("llama", {"model.changes": changes}).model.architecture()
    ids = {"eos_token_id": [1, *range(180, 200)]}
    model = models.create(architecture, jax.random.key(0))
    hf.save(model, folder, dtype="float32", extra_files=[tiny_vocabulary], token_ids=ids)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """A function (arguments) -> exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.run(evaluate.main)
        return stopped.value.code, *capsys.readouterr()

    return run


def test_the_command(call, checkpoint, tmp_path, tiny_vocabulary):
    file, output = tmp_path / "dialogues.jsonl", tmp_path / "out"
    rows = [ROW, {**ROW, "turns": ["z" * POSITIONS]}, {**ROW, "turns": ["a" * 5] * 9, "rule": {"max_words": 99}}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--checkpoint={checkpoint}", f"--dialogues={file}", f"--max_new_tokens={NEW}", f"--output={output}"]
    code, out, error = call(*arguments, "--template=human_bot")
    assert "2 of 3 dialogues ended before their last turn" in error and "(line 2, 3)" in error
    assert code == 0 and out == (output / "consistency.md").read_text()
    lines = [json.loads(line) for line in (output / "llama" / "dialogues.jsonl").read_text().splitlines()]
    first, too_long, cut = lines
    assert [len(each["obeyed"]) for each in (first, too_long)] == [3, 0] and too_long["messages"] == []
    template = Template("human_bot", Vocabulary(tiny_vocabulary, foreign=True))
    # It ended where its next turn would not have fitted.
    turns = len(cut["obeyed"])
    assert 1 <= turns < 9
    longer = [*cut["messages"], {"role": "user", "content": "a" * 5}]
    assert len(template.prompt(longer)) + NEW > POSITIONS >= len(template.prompt(longer[:-2])) + NEW
    for line, rule in ((first, Rule(contains=("x", "y"))), (cut, Rule(max_words=99))):
        responses = [message["content"] for message in line["messages"] if message["role"] == "assistant"]
        assert line["obeyed"] == [rule.holds(response) for response in responses]
    written = json.loads((output / "consistency.json").read_text())
    expected = sum(line["obeyed"][0] for line in (first, cut)) / 2
    assert written["checkpoints"]["llama"]["turns"][0] == {"obeyed": expected, "dialogues": 2}
    assert (output / "consistency.png").stat().st_size > 1000

    # Killed in the middle of a response: what is done stays.
    journal = output / "llama" / ".dialogues.journal"
    whole = journal.read_bytes()
    journal.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b"[2, [1")
    assert call(*arguments, "--template=human_bot")[:2] == (0, out)
    assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines())
    code, _, error = call(*arguments, "--template=llama2")
    assert code == 2 and "holds a run with another settings" in error


def test_a_tokenizer_json_is_read(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "<human>:", "<bot>:", "hi"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    text = types.SimpleNamespace(is_decoder=True, vocabulary=types.SimpleNamespace(path=tmp_path / "tokenizer.json"))
    template = check_template(types.SimpleNamespace(checkpoint=tmp_path, text=text), "human_bot")
    assert template.response(template.prompt([{"role": "user", "content": "hi"}])).split()[:2] == ["<human>:", "hi"]


def test_bad_arguments(call, checkpoint, tmp_path):
    file = tmp_path / "dialogues.jsonl"
    file.write_text(json.dumps(ROW))
    given = [f"--checkpoint={checkpoint}", f"--dialogues={file}"]
    for arguments, message in (
        ([f"--output={tmp_path / 'out'}"], "--dialogues needs --template=…; found none"),
        (["--template=llama2"], "--dialogues needs --output=…; found none"),
        (["--template=lama2", f"--output={tmp_path / 'out'}"], "template='lama2'; expected one of"),
        (
            ["--harness=x"],
            "--preferences, --dialogues, --harness; found --dialogues and",
        ),
    ):
        code, _, error = call(*given, *arguments)
        assert code == 2 and message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dialogues.jsonl"]
