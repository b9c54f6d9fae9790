"""The curve of a run: the table is the metrics', and a folder without any is refused."""

import json

import pytest

from experiments import loss_curve
from gqa.errors import InputError

LINES = [
    {"step": 0, "split": "heldout", "loss": 8.7},
    {"step": 20, "split": "train", "loss": 5.0},
    {"step": 20, "split": "heldout", "loss": 4.5},
]


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    monkeypatch.setattr("sys.argv", ["loss_curve", f"--workdir={tmp_path}", f"--output={tmp_path / 'curve.png'}"])
    loss_curve.main()
    assert capsys.readouterr().out.splitlines() == [
        "| step | held-out loss, nats |",
        "|--:|--:|",
        "| 0 | 8.700 |",
        "| 20 | 4.500 |",
    ]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["loss_curve", f"--workdir={tmp_path}", f"--output={tmp_path / 'curve.png'}"])
    with pytest.raises(InputError, match="no held-out losses"):
        loss_curve.main()


@pytest.mark.parametrize(
    ("output", "line", "message"),
    [
        ("x.foo", LINES[0], r"x\.foo: unknown 'foo'; expected one of .*png"),
        ("x.png", {"step": 0, "split": "heldout"}, r"metrics\.jsonl is no result of gqa\.train"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, output, line, message):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr("sys.argv", ["loss_curve", f"--workdir={tmp_path}", f"--output={tmp_path / output}"])
    with pytest.raises(InputError, match=message):
        loss_curve.main()
    assert not (tmp_path / output).exists()
