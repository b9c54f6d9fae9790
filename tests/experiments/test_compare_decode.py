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


@pytest.mark.parametrize(
    ("family", "kv_heads"), [("mini", [4, 1]), pytest.param("mini_t5", [4], marks=pytest.mark.full)]
)
def test_all_decode_the_same_tokens(run, tmp_path, capsys, family, kv_heads):
    output = tmp_path / "result.json"
    arguments = [f"--family={family}", "--batch=2", "--new_tokens=5", "--repetitions=1", f"--output={output}"]
    run(*arguments, *([f"--kv_heads={','.join(map(str, kv_heads))}"] if family == "mini" else []))
    rows = json.loads(output.read_text())["rows"]
    assert [(row["kv_heads"], row["batch"]) for row in rows] == [(K, 2) for K in kv_heads]
    for row in rows:
        ours = row[compare_decode.OURS]
        for other in ("transformers", "ctranslate2"):
            assert row[other]["same_tokens"] == 1.0
            for key, ratio in row[other]["ours_faster_by"].items():
                assert ratio == pytest.approx(row[other][key] / ours[key])
        assert 0 <= row["transformers bfloat16"]["same_tokens"] <= 1
    assert f"| {kv_heads[-1]} | 2 | ctranslate2 |" in capsys.readouterr().out


def test_goes_on_where_a_file_ends(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)  # not installed
    output = tmp_path / "result.json"
    arguments = ["--family=mini", "--kv_heads=1", "--new_tokens=2", "--repetitions=1", f"--output={output}"]
    run(*arguments, "--batch=1")
    (first,) = json.loads(output.read_text())["rows"]
    assert first["ctranslate2"] == {"missing": "not installed; expected pip install ctranslate2"}
    run(*arguments, "--batch=1,2")
    rows = json.loads(output.read_text())["rows"]
    assert rows[0] == first and [row["batch"] for row in rows] == [1, 2]
    assert "| 1 | 2 | ctranslate2 | not installed; expected pip install ctranslate2 |" in capsys.readouterr().out
    with pytest.raises(InputError, match="is of another repetitions; name a new file"):
        run(*arguments, "--repetitions=2")
    output.write_text("[]")
    with pytest.raises(InputError, match="is no result of this command; name a new file"):
        run(*arguments)


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
