import json
import sys

import pytest

from experiments import compare_decode
from gqa import models
from gqa.errors import InputError


@pytest.fixture
def run(monkeypatch):
    """A function (arguments) that runs the command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare_decode.py", *arguments])
        compare_decode.main()

    return run


def test_both_decode_the_same_tokens(run, tmp_path, capsys):
    output = tmp_path / "result.json"
    run("--family=mini", "--kv_heads=4,1", "--batch=2", "--new_tokens=5", "--repetitions=1", f"--output={output}")
    rows = json.loads(output.read_text())["rows"]
    assert [(row["kv_heads"], row["batch"], row["same_tokens"]) for row in rows] == [(4, 2, 1.0), (1, 2, 1.0)]
    for row in rows:
        for key, ratio in row["speedup"].items():
            assert ratio == pytest.approx(row["theirs"][key] / row["ours"][key])
    assert "| 1 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("family", compare_decode.FAMILIES)
def test_shapes_are_possible(family):
    size, changes, length = compare_decode.FAMILIES[family]
    config = models.replace(models.size(size), **changes)
    assert getattr(config, "max_position", 10**6) >= length + 64 and config.num_heads in config.kv_heads("decoder_self")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family=mini", "--new_tokens=1"), "--new_tokens=1 --repetitions=3; expected at least 2 and 1"),
        (("--family=mini", "--batch=0"), "--batch=0; expected positive numbers"),
        (("--family=mini", "--kv_heads=3"), "=3 does not divide num_heads=4"),
        (("--family=t5_base", "--kv_heads=3"), "stock T5 has 12 at every attention"),
        (("--family=t6",), "invalid choice: 't6'"),
    ],
)
def test_bad_arguments(run, arguments, message):
    with pytest.raises(InputError, match=message):
        run(*arguments)
