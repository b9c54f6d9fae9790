"""The baseline and a model's scores stand in one table, if they are of the same functions."""

import json
import sys

import pytest

from experiments import docstring_baseline
from gqa.errors import InputError

FUNCTION = (
    'def read_the_file(path):\n    """Read the file."""\n    with open(path) as file:\n        return file.read()\n\n\n'
)


@pytest.fixture
def scores(tmp_path):
    content = {
        "checkpoints": {
            "tuned": {
                "path": "runs/tuned",
                "scores": {
                    "docstring": {
                        name: dict(value=value, low=18.5, high=21.25)
                        for name, value in dict(bleu=1.0, rouge2=20.0, rouge1=21.0, rougeLsum=20.0).items()
                    }
                },
            }
        },
        "rows": {"docstring": 2},
        "settings": {"beam": 4},
    }
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    return path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["docstring_baseline", *map(str, arguments)])
    docstring_baseline.main()


def test_table(scores, tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):  # held-out files are chosen by a hash
        (source / f"m{number}.py").write_text(FUNCTION.replace("the_file", f"file_{number}"))
    call(monkeypatch, f"--source={source}", "--limit=2", f"--scores={scores}", f"--output={tmp_path / 'out.json'}")
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| 2 held-out functions | rouge1 | rouge2 | rougeLsum |"
    assert rows[3] == "| tuned, beam of 4 |" + "".join(
        f" {value} [18.50, 21.25] |" for value in ("21.00", *["20.00"] * 2)
    )
    report = json.loads((tmp_path / "out.json").read_text())
    # "read file N" against "Read the file.": 2 of 3 words, both ways.
    assert report["functions"] == 2 and report["copy_the_name"]["rouge1"] == pytest.approx(66.67, abs=0.01)


def test_bad_input_is_refused(scores, monkeypatch):
    monkeypatch.setattr("gqa.data.tasks.examples", lambda *_, **__: iter(range(3)))
    with pytest.raises(InputError, match="is of 2 functions, the baseline of 3; expected --limit=2"):
        call(monkeypatch, f"--scores={scores}")
    with pytest.raises(InputError, match="--limit=0 is below 1"):
        call(monkeypatch, "--limit=0")
    for content in ('{"rows": {"docstring": 2}}', '{"checkpoints": [], "rows": {"docstring": 2}, "settings": {}}'):
        scores.write_text(content)
        with pytest.raises(InputError, match="has no scores of docstring"):
            call(monkeypatch, f"--scores={scores}")
