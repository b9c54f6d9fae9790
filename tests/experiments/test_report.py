"""The report: what is measured and what is committed are told apart, and the numbers are those of the results."""

import json

import jax
import numpy as np
import pytest

from experiments import report, uptrain_full
from gqa import models
from gqa.checkpoints import hf
from gqa.convert import convert
from gqa.training import config as run_config


def measured_row(name, kv_heads, loss, milliseconds):
    return {
        "model": name,
        "kv_heads": {"encoder_self": [8, 8], "decoder_self": [kv_heads] * 2, "cross": [kv_heads] * 2},
        "loss": loss,
        "accuracy": 0.5,
        "target_tokens": 14847,
        "decode": {"median_ms": milliseconds, "min_ms": milliseconds, "max_ms": milliseconds},
    }


@pytest.fixture
def results():
    losses = {
        "MHA": {"converted": scores(3.0), 1: scores(2.98), 2: scores(3.0)},
        "GQA-2": {"converted": scores(3.4), 1: scores(3.1), 2: scores(3.2)},
        "MQA": {"converted": scores(4.0), 1: scores(3.4), 2: scores(3.6)},
    }
    summary = uptrain_full.summarise(losses, alpha=0.05, num_seeds=2)
    return summary | {"command": "python -m experiments.uptrain_full", "commit": "abc"}


def scores(loss):
    return {"loss": loss, "target_tokens": 230000, "unigram_loss": 5.7, "corpus": {"heldout": "e23d"}}


@pytest.fixture
def full_report(results):
    rows = [
        measured_row("MHA", 8, 3.0, 12.0),
        measured_row("GQA-2 converted", 2, 3.4, 6.0),
        measured_row("GQA-2 uptrained", 2, 3.2, 6.0),
        measured_row("MQA converted", 1, 4.0, 4.0),
        measured_row("GQA-2 best conversion", 2, 3.05, 6.0),
        measured_row("MQA best conversion", 1, 3.15, 4.0),
    ]
    measured = {
        "rows": rows,
        "alpha": 0.01,
        "uptraining_steps": 40,
        "original_steps": 4000,
        "timing": report.TIMING,
        "unigram_loss": 5.7,
        "source": "embedded",
        "corpus_digests": {"heldout": "d1ge57"},
        "machine": {"cores": 2, "cpu": "a processor"},
    }
    return {"measured": measured, "committed": results}


def test_share_of_the_gap_that_uptraining_closes(results):
    rows = {(row["model"], row["uptrained"]): row for row in results["rows"]}
    # GQA-2 goes from +0.40 to +0.15 over the teacher: 62.5 %; the control is at 2.99, so +0.16 over it: 60 %.
    assert rows["GQA-2", True]["gap_closed"] == pytest.approx(0.625)
    assert rows["GQA-2", True]["gap_closed_against_control"] == pytest.approx(0.6)
    assert rows["GQA-2", True]["loss_spread"] == pytest.approx(np.std([3.1, 3.2], ddof=1))
    assert rows["MHA", True]["gap_closed"] is None
    assert "| GQA-2 | 5% | 3.1500 ± 0.0707 | +0.1500 | 62% (60% against the control) |" in results["table"]


def test_markdown_tells_measured_and_committed_apart(full_report):
    text = report.as_markdown(full_report)
    now, committed = text.split("## Committed: α = 5%, 2 seeds")
    assert "| GQA-2 uptrained | 2, 2 | 3.200 | +0.200 | 6.0 | 2.00x |" in now
    assert "| MQA best conversion | 1, 1 | 3.150 | +0.150 | 4.0 | 3.00x |" in now
    assert "40 of 4000 steps, α = 1.0%" in now and "digest d1ge57" in now
    assert "| MQA | 5% | 3.5000 ± 0.1414 | +0.5000 | 50% (49% against the control) |" in committed


def test_without_committed_results_the_report_has_one_part(full_report):
    assert "Committed" not in report.as_markdown(full_report | {"committed": None})


def test_picture_is_drawn(full_report, tmp_path):
    report.draw(full_report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["gqa2", "mqa_best", "uptrain/model"])
def test_missing_folders_are_named(missing, tmp_path, monkeypatch, capsys):
    for folder in {"gqa2", "mqa", "gqa2_best", "mqa_best", "uptrain/model"} - {missing}:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "teacher").mkdir()
    arguments = ["report", f"--runs={tmp_path}", f"--output={tmp_path / 'report'}", f"--teacher={tmp_path / 'teacher'}"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(report.InputError, match=missing):
        report.main()
    assert not (tmp_path / "report").exists()


def test_a_damaged_configuration_is_named(tmp_path, monkeypatch):
    for folder in ("gqa2", "mqa", "gqa2_best", "mqa_best", "uptrain/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "uptrain" / "config.json").write_text("{")
    arguments = ["report", f"--runs={tmp_path}", f"--output={tmp_path / 'report'}", f"--teacher={tmp_path}"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(report.InputError, match=r"uptrain/config\.json is not readable JSON"):
        report.main()


def test_everything_is_measured(tiny_run, tmp_path, monkeypatch, capsys):
    """From the folders of a quickstart, made of a tiny model, to its report."""
    uptrain = {"original_steps": 100, "alpha": 0.1}
    config = tiny_run("t5", {"train.steps": None, "uptrain": uptrain})
    architecture = models.replace(config.model.architecture(), decoder_self_kv_heads=8, cross_kv_heads=8)
    teacher = models.create(architecture, jax.random.key(0))
    hf.save(teacher, tmp_path / "teacher", dtype="float32")
    for name, K in {"gqa2": 2, "mqa": 1, "gqa2_best": 2, "mqa_best": 1, "uptrain/model": 2}.items():
        converted = convert(teacher, dict(decoder_self=K, cross=K), "mean", jax.random.key(0))
        hf.save(converted, tmp_path / "runs" / name, dtype="float32")
    (tmp_path / "runs" / "uptrain" / "config.json").write_text(json.dumps(run_config.to_json(config)))
    monkeypatch.setattr(report, "TIMING", dict(batch_size=2, inputs_length=8, num_tokens=2, repetitions=1))
    output = tmp_path / "report"
    arguments = ["report", f"--runs={tmp_path / 'runs'}", f"--output={output}", f"--teacher={tmp_path / 'teacher'}"]
    monkeypatch.setattr("sys.argv", arguments)
    report.main()
    measured = json.loads((output / "report.json").read_text())["measured"]
    rows = {row["model"]: row for row in measured["rows"]}
    assert {name: row["kv_heads"]["cross"][0] for name, row in rows.items()} == {
        "MHA": 8,
        "GQA-2 converted": 2,
        "GQA-2 uptrained": 2,
        "MQA converted": 1,
        "GQA-2 best conversion": 2,
        "MQA best conversion": 1,
    }
    assert rows["GQA-2 converted"]["loss"] == rows["GQA-2 uptrained"]["loss"] != rows["MHA"]["loss"]
    assert measured["uptraining_steps"] == 10
    assert sorted(path.name for path in output.iterdir()) == ["quality_vs_latency.png", "report.json", "report.md"]
    assert "| MQA best conversion | 1, 1 |" in capsys.readouterr().out

    hf.save(
        models.create(tiny_run("llama").model.architecture(), jax.random.key(0)), tmp_path / "llama", dtype="float32"
    )
    monkeypatch.setattr(
        "sys.argv", [*arguments[:2], f"--output={tmp_path / 'other'}", f"--teacher={tmp_path / 'llama'}"]
    )
    with pytest.raises(report.InputError, match="llama is a decoder; expected the encoder-decoder"):
        report.main()


def test_results_are_json(results):
    assert json.loads(json.dumps(results)) == results
