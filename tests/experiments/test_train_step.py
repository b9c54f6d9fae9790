"""Training step against transformers, and compilation by depth: what they report, and what refuses bad input."""

import importlib.util
import json
import re
import sys

import pytest

from experiments import compile_time, train_step
from gqa import command_line
from gqa.errors import InputError
from gqa.training.config import parse

TINY = (
    "vocab_size=64 d_model=32 num_heads=4 head_dim=8 d_ff=48 num_encoder_layers=2 num_decoder_layers=2 "
    "encoder_self_kv_heads=4 decoder_self_kv_heads=4 cross_kv_heads=4"
)
OVERRIDES = [f"--config.model.changes.{change}" for change in TINY.split()]


@pytest.fixture
def tiny_config():
    return parse(command_line.load_config("configs/teacher_t5.py", OVERRIDES))


@pytest.mark.full
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="the parity extra is not installed")
def test_both_implementations_compute_the_same_loss(tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    options = ["--rows=2", "--inputs_length=12", "--repeats=1", f"--output={output}", *OVERRIDES]
    monkeypatch.setattr(sys, "argv", ["train_step", *options])
    train_step.main()

    result = json.loads(output.read_text())
    names = ["ours, unrolled", "ours, scanned", "transformers, sdpa", "transformers, eager"]
    losses = [result["losses"][name][kind] for name in names for kind in ("gradients", "step")]
    assert losses == pytest.approx([losses[0]] * 8, rel=1e-4)
    assert 2 < losses[0] < 10  # nats a token, of random weights over 64 tokens
    assert result["batch"] == {"rows": 2, "inputs_length": 12, "targets_length": 4}
    assert result["model"]["layers"] == [2, 2] and result["model"]["d_model"] == 32
    for kind in ("gradients", "step"):
        assert list(result["milliseconds"][kind]) == names
        for found in result["milliseconds"][kind].values():
            assert 0 < found["min_ms"] <= found["median_ms"]
    assert result["command"] == "python -m experiments.train_step " + " ".join(options)
    assert {"cpu", "cores", "jax", "torch", "transformers"} <= set(result["machine"])
    assert "\n".join(result["table"]) in capsys.readouterr().out


def test_ratios_are_to_the_faster_of_transformers():
    gradients = {"ours": 30.0, "transformers, a": 20.0, "transformers, b": 60.0}
    steps = {"ours": 30.0, "transformers, a": 60.0, "transformers, b": 40.0}
    milliseconds = {
        kind: {name: {"median_ms": value, "min_ms": value - 1} for name, value in of_names.items()}
        for kind, of_names in {"gradients": gradients, "step": steps}.items()
    }
    assert train_step.table(milliseconds)[2:] == [
        "| ours | 30.0 | 29.0 | 1.50 | 30.0 | 29.0 | 0.75 |",
        "| transformers, a | 20.0 | 19.0 | 1.00 | 60.0 | 59.0 | 1.50 |",
        "| transformers, b | 60.0 | 59.0 | 3.00 | 40.0 | 39.0 | 1.00 |",
    ]


def test_losses_that_differ_are_refused():
    train_step.check_losses({"ours": {"step": 5.0}, "theirs": {"step": 5.0004}})
    for loss in (5.001, float("nan")):
        with pytest.raises(RuntimeError, match="the implementations differ"):
            train_step.check_losses({"ours": {"step": 5.0}, "theirs": {"step": loss}})


def test_scanned_programs_do_not_grow_with_depth(tiny_config):
    def lines(layers, scan_layers):
        return len(compile_time.lowered_step(tiny_config, layers, scan_layers=scan_layers).as_text().splitlines())

    assert lines(2, True) == lines(5, True)
    assert lines(5, False) > 1.5 * lines(2, False)


@pytest.mark.full
def test_compile_time_reports_every_form_and_depth(tiny_config):
    rows = compile_time.measure(tiny_config, [1], 1)
    assert [(row["form"], row["layers"]) for row in rows] == [("scanned", 1), ("unrolled", 1)]
    pattern = r"\| 1 \| (scanned|unrolled) \| \d+ \| \d+\.\d \| \d+\.\d \|"
    assert all(re.fullmatch(pattern, line) for line in compile_time.table(rows)[2:])


@pytest.mark.parametrize(
    ("module", "option", "message"),
    [
        (train_step, "--repeats=0", "--repeats=0; expected at least 1"),
        (train_step, "--rows=-1", "--rows=-1; expected at least 1"),
        (train_step, "--config.model.dtype=bfloat16", "configs/teacher_t5.py is no T5 in float32"),
        (compile_time, "--layers=4,x", "--layers=4,x; expected numbers of at least 1, such as 4,8,24"),
        (compile_time, "--repeats=0", "--repeats=0; expected at least 1"),
    ],
)
def test_bad_input_is_refused(module, option, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiment", option])
    with pytest.raises(InputError, match=re.escape(message)):
        module.main()
