"""The data of the post-training example: the rule in literal examples, and pairs that no response alone can tell."""

import json

import pytest

from experiments import posttraining_data
from experiments.posttraining_data import INSTRUCTION, Function, mentioned, preferences, prompt_of

NAMES = ["read_file", "find_name", "get_path", "set_list", "add_value"]  # as many tokens in each one's docstring


def function(name):
    """A function whose docstring mentions both words of its name, and nothing of another one's."""
    first, second = name.split("_")
    return Function(f"{INSTRUCTION}def {name}(x):\n    return x", f"{first.title()} every {second} of it.")


@pytest.mark.parametrize(
    ("code", "response", "count"),
    [
        ("def read_file(path): return path", "Read the file at path.", 3),
        ("def readFile(self): return self.HTTPServer", "Return what the server of http reads.", 2),  # not read, reads
        (
            "def names(for_all):",
            "Return for all names, names and names.",
            1,
        ),  # once; Python's own and common ones never
        ("def f(x):", "Do of it.", 0),
    ],
)
def test_rule(code, response, count):
    assert mentioned(INSTRUCTION + code, response) == count


def test_words_of_the_instruction_do_not_count():
    assert mentioned(INSTRUCTION + "def f(x):", "Document this function.") == 0


def test_prompts_are_cut_between_lines():
    first, second = "def f(x):", "    return " + "x" * 170
    assert prompt_of(f"{first}\n{second}\n    pass") == f"{INSTRUCTION}{first}\n{second}"
    assert prompt_of(f"{first}\n{second}{'x' * 20}") == f"{INSTRUCTION}{first}"
    assert prompt_of(f"def f({'x' * 200}):\n    pass") is None


def test_pairs_are_there_twice_mirrored():
    read, opened, closed = map(function, NAMES[:3])
    # Of another length, and one that mentions a single word of its own.
    others = [(function(NAMES[3]), 9), (Function(f"{INSTRUCTION}def copy():\n    pass", "Copy every bit of it."), 8)]
    rows = preferences([(read, 8), (opened, 8), (closed, 8), *others])
    found = {(row["prompt"], row["chosen"], row["rejected"], row["rating"]) for row in rows}
    assert found == {
        (chosen.prompt, chosen.response, rejected.response, "slightly better")
        for chosen, rejected in [(read, opened), (opened, read), (opened, closed), (closed, opened)]
    }
    assert len(rows) == 4


def test_ratings_grow_with_the_difference():
    many = [
        Function(f"{INSTRUCTION}def f({', '.join(words)}):", " ".join(words))
        for words in ("alpha beta gamma delta".split(), "four five six".split(), "red green blue white black".split())
    ]
    rows = preferences([(each, 8) for each in many])
    assert {row["chosen"].split()[0]: row["rating"] for row in rows} == {
        "alpha": "significantly better",
        "four": "better",
        "red": "significantly better",
    }


@pytest.fixture
def source(tmp_path):
    """Six files of the same five functions under other names."""
    folder = tmp_path / "source"
    folder.mkdir()
    for letter in "abcdef":
        text = ""
        for name in NAMES:
            text += f'def {name}_{letter}(x):\n    """{function(name).response}"""\n    y = x\n    return y\n\n\n'
        (folder / f"{letter}.py").write_text(text)
    return folder


def test_files(source, tmp_path, monkeypatch, capsys):
    output = tmp_path / "data"
    monkeypatch.setattr("sys.argv", ["posttraining_data", f"--source={source}", f"--output={output}"])
    posttraining_data.main()
    read = {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in output.glob("*.jsonl")}
    about = json.loads((output / "data.json").read_text())
    assert about["lines"] == {name: len(rows) for name, rows in read.items()}
    asked = {name: {row["prompt"] for row in rows} for name, rows in read.items() if name != "chats"}
    asked["chats"] = {row["messages"][0]["content"] for row in read["chats"]}
    # 25 functions of five files, a quarter of them for prompts alone; those of the sixth file are held out.
    assert {name: len(prompts) for name, prompts in asked.items() if "preferences" not in name} == {
        "chats": 19,
        "prompts": 6,
        "prompts_heldout": 5,
    }
    assert asked["preferences"] <= asked["chats"] and asked["preferences_heldout"] <= asked["prompts_heldout"]
    assert not asked["chats"] & asked["prompts"] and not (asked["chats"] | asked["prompts"]) & asked["prompts_heldout"]
    heldout = {prompt.split("(")[0][-1] for prompt in asked["prompts_heldout"]}
    assert len(heldout) == 1 and not any(f"_{heldout}(" in prompt for prompt in asked["chats"] | asked["prompts"])
    for name in ("preferences", "preferences_heldout"):
        assert read[name]
        assert sorted(row["chosen"] for row in read[name]) == sorted(row["rejected"] for row in read[name])
    assert {
        "prompt": f"{INSTRUCTION}def read_file_{heldout.pop()}(x):\n    y = x\n    return y",
        "response": "Read every file of it.",
    } in read["prompts_heldout"]
    with pytest.raises(posttraining_data.InputError, match="exists already"):
        posttraining_data.main()


def test_too_little_source_is_refused(tmp_path, monkeypatch):
    for letter in "ab":
        (tmp_path / f"{letter}.py").write_text(f"def {letter}(x):\n    return x\n")
    monkeypatch.setattr("sys.argv", ["posttraining_data", f"--source={tmp_path}", f"--output={tmp_path / 'data'}"])
    with pytest.raises(posttraining_data.InputError, match="gives no chats"):
        posttraining_data.main()
    assert not (tmp_path / "data").exists()
