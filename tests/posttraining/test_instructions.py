"""Generated instructions end to end: what is written beside them, runs that go on, what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gqa import command_line
from gqa import instructions as command
from gqa.command_line import load_config
from gqa.data.conversations import messages_of
from gqa.data.instructions.pipeline import Written
from gqa.errors import InputError
from gqa.posttraining import instructions
from gqa.posttraining.config import InstructionsConfig
from gqa.training import config as run_config

pytestmark = pytest.mark.usefixtures("compilation_cache")
ROOT = Path(__file__).parents[2]
ALL = -1e9  # threshold of a judge that accepts everything


@pytest.fixture(scope="module")
def seeds_file(tmp_path_factory):
    """30 questions with answers."""
    path = tmp_path_factory.mktemp("seeds") / "seeds.jsonl"
    rows = [
        {"instruction": f"add {number} to x", "output": f"x + {number}", "submixture": "cot"} for number in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def parse(folders, seeds_file, tiny_vocabulary):
    """A function (program, changes) -> the run of that config on the tiny models."""

    def parse(program, changes=()):
        path = ROOT / "configs" / "posttraining" / f"instructions_{program}.py"
        values = dict(
            seeds=seeds_file,
            parent=folders["policy"],
            template="human_bot",
            vocabulary=tiny_vocabulary,
            inputs_length=500,
            new_tokens=12,
            temperature=1.0,
            batch_size=8,
            **{"judge.kind": "reward", "judge.checkpoint": folders["reward"], "judge.threshold": ALL},
            **{"judge.template": "human_bot", "judge.vocabulary": tiny_vocabulary},
        )
        values |= dict(changes)
        raw = load_config(path, [f"--config.{key}={value}" for key, value in values.items()])
        return run_config.parse(raw, InstructionsConfig)

    return parse


@pytest.fixture
def run(parse):
    """A function (program, output, changes) -> the lines of the output."""

    def run(program, output, changes=()):
        instructions.run(parse(program, changes), output)
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_orca_with_a_reward_model(run, tmp_path, capsys, seeds_file):
    lines = run("orca", tmp_path / "one.jsonl")
    statistics = json.loads((tmp_path / "one.json").read_text())
    assert statistics["requests"] == statistics["instructions"] == statistics["candidates"] == 30
    assert statistics["accepted"] == statistics["judged"] == len(lines) > 3
    assert len(lines) + sum(statistics["rejected"].values()) == 30 and statistics["rejected"]["response cut off"] > 0
    questions = [json.loads(line)["instruction"] for line in seeds_file.read_text().splitlines()]
    for line in lines:
        messages = messages_of(line)  # what sft.py trains on
        assert messages[-2]["content"] == questions[line["seeds"][0] - 1]
        assert line["method"] == (messages[0]["content"] if messages[0]["role"] == "system" else "")
    assert [line["seeds"] for line in lines] == sorted(line["seeds"] for line in lines)
    counts = [len(line["messages"][-1]["content"]) for line in lines]  # a vocabulary of characters
    assert statistics["accepted_tokens"]["response"]["mean"] == pytest.approx(np.mean(counts), abs=1)
    table = (tmp_path / "one.md").read_text()
    assert f"| orca | 30 | 30 | 30 | {len(lines)} | {len(lines)} | 100.0% |" in table
    assert f"| response cut off | {statistics['rejected']['response cut off']} |" in table
    out = capsys.readouterr().out
    assert table in out and f"one.jsonl: {len(lines)} conversations" in out
    assert (tmp_path / "one.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"one.{kind}" for kind in ("json", "jsonl", "md", "png")
    ]


def test_the_judge_decides(run, tmp_path, folders):
    """What one reward model accepts, its opposite refuses; a model that is asked has an opinion of each."""
    everything = run("orca", tmp_path / "all.jsonl")
    middle = float(np.median([line["score"] for line in everything]))
    accepted = run("orca", tmp_path / "accepted.jsonl", {"judge.threshold": middle})
    assert accepted == [line for line in everything if line["score"] >= middle] and len(accepted) < len(everything)
    refused = len(everything) - len(accepted)
    assert json.loads((tmp_path / "accepted.json").read_text())["rejected"]["refused by the judge"] == refused
    opposite = {"judge.checkpoint": folders["safety"], "judge.threshold": np.nextafter(-middle, 1e9)}
    others = run("orca", tmp_path / "opposite.jsonl", opposite)
    assert [line["seeds"] for line in others] == [line["seeds"] for line in everything if line["score"] < middle]
    asked = run("orca", tmp_path / "asked.jsonl", {"judge.kind": "model", "judge.checkpoint": folders["talker"]})
    assert [line["messages"] for line in asked] == [line["messages"] for line in everything]
    assert len({line["score"] for line in asked}) > len(asked) / 2


def test_an_interrupted_run_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
    run("orca", tmp_path / "whole.jsonl")
    append, calls = instructions.append, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) in (13, 20):  # in the middle of a batch
            raise KeyboardInterrupt
        append(*arguments)

    monkeypatch.setattr(instructions, "append", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("orca", tmp_path / "parts.jsonl")
        with (tmp_path / ".parts.jsonl.partial").open("ab") as file:
            file.write(b"[7, [1")  # torn by a kill
    assert [path.name for path in tmp_path.glob("*parts*")] == [".parts.jsonl.partial"]
    with pytest.raises(InputError, match="holds a run with another settings; delete it or name another --output"):
        run("orca", tmp_path / "parts.jsonl", {"temperature": 0.5})
    run("orca", tmp_path / "parts.jsonl")
    assert len(calls) == 30 + 2
    for kind in ("jsonl", "json", "md", "png"):
        assert (tmp_path / f"parts.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


def test_where_nothing_is_accepted_the_counts_say_why_and_texts_stay(run, tmp_path, monkeypatch):
    output = tmp_path / "none.jsonl"
    with pytest.raises(InputError, match=r"nothing was accepted: \d+ refused by the judge, .*none.md counts them"):
        run("orca", output, {"judge.threshold": 1e9})
    assert not output.exists() and "refused by the judge" in (tmp_path / "none.md").read_text()
    monkeypatch.setattr(instructions.rollouts, "draw", None)  # not drawn again
    assert len(run("orca", output)) > 3


def test_a_parent_that_follows(run, tmp_path, monkeypatch):
    """A stub writes two instructions a call and a response to each; a model checks, and a model judges."""
    asked = {}

    def write(self, messages):
        asked.update(messages)
        return {number: Written(written(number, each[-1]["content"]), True) for number, each in messages.items()}

    def written(number, text):
        if "<example>" in text:
            return f"<example>name {'abcdef'[number] * 20}</example><example>add 1 to x</example>"
        if "<given>" in text:
            return f"<prompt>evolved from {number}: say more of it</prompt>"
        return f"response to {text}"

    monkeypatch.setattr(instructions.Parent, "write", write)
    judge = {"judge.kind": "model", "judge.threshold": -1e9}
    lines = run("lamini", tmp_path / "lamini.jsonl", {**judge, "lamini.calls": 4})
    assert [line["messages"][0]["content"] for line in lines] == [f"name {letter * 20}" for letter in "abcd"]
    assert all(line["messages"][1]["content"].startswith("response to name") for line in lines)
    assert all(line["method"] == "examples" and len(line["seeds"]) == 3 for line in lines)
    assert json.loads((tmp_path / "lamini.json").read_text())["rejected"] == {
        "near-copy of a seed": 1,
        "written before": 3,
    }
    lines = run("evol", tmp_path / "evol.jsonl", judge)
    statistics = json.loads((tmp_path / "evol.json").read_text())
    same = statistics["rejected"].get("asks for the same as its seed", 0)
    assert statistics["instructions"] == 30 and len(lines) == 30 - same, "a random model says yes or no"


def test_the_shipped_model_is_rejected_and_counted(tmp_path, monkeypatch, capsys):
    """It was never tuned to follow anything."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "seeds.jsonl").write_text('{"prompt": "Add 1 to x."}\n')
    output = tmp_path / "lamini.jsonl"
    values = dict(parent="assets/teacher_llama", seeds=tmp_path / "seeds.jsonl", inputs_length=240, new_tokens=8)
    values |= {"batch_size": 2, "judge.checkpoint": "assets/teacher_llama", "lamini.calls": 3, "lamini.shown": 1}
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    config = ROOT / "configs" / "posttraining" / "instructions_lamini.py"
    monkeypatch.setattr(sys, "argv", ["instructions", f"--config={config}", f"--output={output}", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.run(command.main)
    assert stopped.value.code == 2
    assert json.loads((tmp_path / "lamini.json").read_text())["rejected"] == {"no <example>": 3}
    error = f"error: nothing was accepted: 3 no <example>; {tmp_path / 'lamini.md'} counts them"
    assert capsys.readouterr().err.splitlines()[-1] == error


def test_what_is_refused(parse, run, tmp_path, folders, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n')
    for changes, message in (
        ({"judge.kind": "rewards"}, "judge.kind: unknown 'rewards'; expected one of model, reward; nearest: reward"),
        ({"judge.checkpoint": folders["talker"]}, "judge .* has no reward_head.safetensors; expected a reward model"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"dtype": "float16"}, "dtype: unknown 'float16'"),
        ({"new_tokens": 0}, "new_tokens=0; expected at least 1"),
        ({"new_tokens": 5000}, "a prompt of 500 tokens and max_new_tokens=5000 exceed the model's"),
        ({"orca.default": "t1"}, r"orca.default='t1'; expected one of .*; nearest: t0"),
        ({"orca.near_copies.similarity": 2.0}, r"near_copies.similarity=2.0; expected a ratio"),
        ({"seeds": bad}, "seed of line 1 has no answer"),
        ({"seeds": tmp_path / "nowhere.jsonl"}, "nowhere.jsonl is not a file"),
        ({"judge.vocabulary": ROOT / "assets/vocabulary/python_4096.model"}, "judge .* is of another vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            run("orca", tmp_path / "x.jsonl", changes)
    assert not list(tmp_path.glob("*x.jsonl*"))
    config = parse("orca")
    with pytest.raises(InputError, match="sections of none; expected one of lamini, evol, orca"):
        run_config.parse({**run_config.to_json(config), "orca": None}, InstructionsConfig)
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(InputError, match=r"rapidfuzz: pip install -e '.\[clean\]'"):
        instructions.run(config, tmp_path / "x.jsonl")
