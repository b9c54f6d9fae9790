"""Speed of a conversion: what is made, measured and reported, and what refuses bad input."""

import json
import re
import sys

import pytest
from safetensors.numpy import load_file

from experiments import convert_speed
from gqa.errors import InputError


def test_a_tiny_checkpoint_is_copied_and_converted(tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    options = ["--size_gb=0.0005", "--repeats=1", f"--folder={tmp_path}", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", ["convert_speed", *options])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    convert_speed.main()

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads(output.read_text())
    # Two embeddings of 256 x 64; in each layer 4 kernels of 64 x 64, 3 of 64 x 176 and 2 norms of 64; one more norm.
    layers = 2
    weights = 4 * (2 * 256 * 64 + layers * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64)
    assert weights < result["source_bytes"] < weights + 4000  # and the header
    assert result["largest_tensor_bytes"] == 4 * 256 * 64
    for name in ("cp, sync", "convert, sync"):
        assert result["median_seconds"][name] == result["runs"][name]["seconds"][0] > 0
    assert result["runs"]["convert, sync"]["peak_bytes"] == [result["peak_bytes"]]
    assert result["runs"]["cp, sync"]["peak_bytes"][0] < 5e7 < result["peak_bytes"]
    assert result["command"] == "python -m experiments.convert_speed " + " ".join(options)
    assert "\n".join(result["table"]) in capsys.readouterr().out


def test_the_checkpoint_is_of_random_float32(tmp_path):
    sizes = convert_speed.make_checkpoint(tmp_path / "source", 0.0005)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}
    assert all(0.015 < tensor.std() < 0.025 for tensor in tensors.values())
    assert sizes["source_bytes"] == (tmp_path / "source" / "model.safetensors").stat().st_size


def test_sizes():
    assert convert_speed.architecture(4).num_layers == 17  # of 51 million parameters, and 131 million outside
    assert convert_speed.architecture(4).d_model == 2048
    assert convert_speed.architecture(1e-9).num_layers == 1


def test_medians_ratio_and_goals():
    runs = {
        "cp, sync": {"seconds": [6.0, 4.0, 5.0], "peak_bytes": [1, 1, 1]},
        "convert, sync": {"seconds": [10.0, 20.0, 8.0], "peak_bytes": [2_000_000_000, 1_700_000_001, 1]},
    }
    result = convert_speed.summary({"source_bytes": 4_000_000_000, "largest_tensor_bytes": 100_000_000}, runs)
    assert result["rate_ratio"] == 0.5
    assert result["goals_met"] == {"rate": False, "memory": False}
    assert result["table"] == [
        "| | seconds | MB/s | to cp |",
        "|---|--:|--:|--:|",
        "| cp, sync | 5.0 | 800 | 1.00 |",
        "| convert, sync | 10.0 | 400 | 0.50 |",
        "",
        "4.00 GB; rate of the copy's: 0.50 (goal: 0.6); peak memory: 2.00 GB (goal: 1.70)",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--size_gb=0", "--size_gb=0.0; expected a positive number of gigabytes"),
        ("--size_gb=nan", "--size_gb=nan; expected a positive number of gigabytes"),
        ("--repeats=0", "--repeats=0; expected at least 1"),
        ("--folder=/nowhere", "--folder=/nowhere is no directory; expected one with room"),
    ],
)
def test_bad_input_is_refused(option, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert_speed", option])
    with pytest.raises(InputError, match=re.escape(message)):
        convert_speed.main()
