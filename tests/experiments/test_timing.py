import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import bandwidth, timing
from gqa import models
from gqa.errors import InputError

ROOT = Path(__file__).parents[2]


def architecture(size, **changes):
    return models.replace(models.size(size), dtype="bfloat16", param_dtype="bfloat16", **changes)


@pytest.mark.parametrize(("kv_heads", "gigabytes"), [(64, 40.1), (8, 13.4), (1, 10.0)])
def test_bytes_of_a_step_of_t5_xxl(kv_heads, gigabytes):
    """Batch 32, 2048 inputs, 256 cached positions, bfloat16: computed by hand once."""
    heads = dict(decoder_self_kv_heads=kv_heads, cross_kv_heads=kv_heads)
    parts = bandwidth.step_bytes(architecture("t5_1_1_xxl", **heads), 32, 2048, 256, None, None)
    assert sum(parts.values()) == pytest.approx(gigabytes * 1e9, rel=0.02)
    # 2 (key, value) x 24 layers x heads x 64 x 2 bytes x 32 rows x 2048 positions
    assert parts["cross_cache"] == 2 * 24 * kv_heads * 64 * 2 * 32 * 2048


def test_bytes_of_a_step_of_llama():
    parts = bandwidth.step_bytes(architecture("llama_mini", vocab_size=100), 3, 10, 7, None, None)
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert parts["weights"] == 2 * (2 * layer + 64 * 100)
    assert parts["self_cache"] == 2 * 2 * 4 * 16 * 2 * 3 * 16
    assert parts["cross_cache"] == 0
    quantised = bandwidth.step_bytes(architecture("llama_mini", vocab_size=100), 3, 10, 7, "int8", None)
    assert quantised["self_cache"] == 2 * 2 * 4 * (16 + 4) * 3 * 16
    kernels, norms, outputs = 4 * 64 * 64 + 3 * 64 * 96, 2 * 64, 4 * 64 + 2 * 96 + 64  # of a layer
    int8 = bandwidth.step_bytes(architecture("llama_mini", vocab_size=100), 3, 10, 7, None, "int8")
    assert int8["weights"] == 2 * (kernels + 2 * norms + 4 * outputs) + 64 * 100 + 4 * 100
    int4 = bandwidth.step_bytes(architecture("llama_mini", vocab_size=100), 3, 10, 7, None, "int4")
    # A scale for 64 inputs; the MLP's output has 96, which 32 divides.
    scales = outputs - 64 + 64 * 3
    assert int4["weights"] == 2 * (kernels // 2 + 2 * norms + 4 * scales) + 64 * 100 // 2 + 4 * 100


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function (overrides) that times the mini T5."""
    config = tmp_path / "config.py"
    values = dict(size="t5_1_1_mini", changes={}, kv_heads=(1, 4), dtype="float32", weights=(None,), cache=(None,))
    values |= dict(max_batch_size=2, inputs_length=16, new_tokens=4, repetitions=2)
    values |= dict(num_prompts=0, num_drafted=0, draft_kv_heads=1, split_k=False)
    config.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 2**16)

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["timing.py", f"--config={config}", *overrides])
        timing.main()

    return run


def test_table_json_and_picture(run, tmp_path, capsys):
    run(f"--output={tmp_path / 'out'}", "--config.weights=None,int4", "--config.cache=None,int8")
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "timing.json").read_text())
    kinds = [(row["kv_heads"], row["batch_size"], row["weights"], row["cache"]) for row in results["rows"]]
    assert kinds == [(1, 2, None, None), (4, 2, None, None), (1, 2, "int4", "int8"), (4, 2, "int4", "int8")]
    for row in results["rows"]:
        total = sum(row["step_bytes"].values())
        assert row["gb_per_second"] == pytest.approx(total / row["step_ms"] / 1e6)
        assert (row["cache_seconds"] is None) == (row["cache"] == "int8")
        share = row["gb_per_second"] / results["copy_gb_per_second"]
        assert f"| {row['gb_per_second']:.1f} | {share:.0%} |" in out
    assert (tmp_path / "out" / "timing.png").read_bytes().startswith(b"\x89PNG")
    assert "| 4 | float32, float32 | 2 |" in out and "| 4 | int4, int8 | 2 |" in out


def test_repetitions_are_added_to_those_of_the_same_measurement_alone(run, tmp_path, capsys):
    output = tmp_path / "out"
    run(f"--output={output}", "--add", "--config.kv_heads=1")
    first = json.loads((output / "timing.json").read_text())
    run(f"--output={output}", "--add", "--config.kv_heads=1")
    second = json.loads((output / "timing.json").read_text())
    assert second["copy_gb_per_second"] >= first["copy_gb_per_second"]
    for before, after in zip(first["rows"], second["rows"], strict=True):
        for part, times in before["repetitions"].items():
            assert after["repetitions"][part][: len(times)] == times and len(after["repetitions"][part]) == 4
        reading, decoding = (after["repetitions"][part] for part in ("reading", "decoding"))
        assert after["step_ms"] == pytest.approx(1e3 * np.median(decoding) / 4)
        samples = np.add(reading, decoding) / 2
        assert after["seconds_per_sample"] == pytest.approx(np.median(samples))
        assert after["seconds_per_sample_range"] == pytest.approx([samples.min(), samples.max()])
    assert "median of 4;" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"exists already; name a new folder, or add to it with --add"):
        run(f"--output={output}")
    with pytest.raises(InputError, match=r"is of another config \(new_tokens differ\); name a new folder"):
        run(f"--output={output}", "--add", "--config.kv_heads=1", "--config.new_tokens=5")
    with pytest.raises(InputError, match="--add without --output; expected the folder to add to"):
        run("--add")
    assert json.loads((output / "timing.json").read_text()) == second
    for change, found in (({"rows": [{}]}, "KeyError: 'repetitions'"), ({"config": [1], "rows": []}, "TypeError: .*")):
        (output / "timing.json").write_text(json.dumps(first | change))
        with pytest.raises(InputError, match=rf"timing\.json is no measurement to add to \({found}\)"):
            run(f"--output={output}", "--add", "--config.kv_heads=1")


def test_continuous_batching_and_speculation(run, tmp_path, capsys):
    run(
        "--config.size=llama_mini",
        "--config.kv_heads=4",
        "--config.num_prompts=5",
        "--config.num_drafted=2",
        f"--output={tmp_path / 'out'}",
    )
    (row,) = json.loads((tmp_path / "out" / "timing.json").read_text())["rows"]
    mixed, speculation = row["mixed_prompts"], row["speculation"]
    assert 5 <= mixed["new_tokens"] <= 20
    assert 0 <= speculation["accepted"] <= 1 and speculation["draft_kv_heads"] == 1
    found = capsys.readouterr().out
    tokens_per_second = [f"{mixed[f'{name}_tokens_per_second']:.1f}" for name in ("in_turn", "continuous")]
    assert f"| 4 | 5 | {' | '.join(tokens_per_second)} |" in found
    assert f"| 4 | K = 1, 2 tokens | {speculation['accepted']:.0%} |" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.kv_heads=3", "=3 does not divide num_heads=4"),
        ("--config.new_tokens=1", r"config\.new_tokens=1; expected at least 2"),
        ("--config.repetitions=0", r"config\.repetitions=0; expected at least 1"),
        ("--config.weights=int3", r"weights='int3'; expected int8, int4, nf4"),
        ("--config.weights=None,int8", r"config\.weights=.* and config\.cache=.*; expected as many of each"),
        ("--config.size=t5", "no model size 't5'"),
        ("--config.dtype=float16", "config.dtype: unknown 'float16'; expected one of float32, bfloat16"),
        ("--config.kv_heads=", r"config\.kv_heads=\(\); expected at least one number of heads"),
        ("--config.num_prompts=-2", r"config\.num_prompts=-2; expected at least 0"),
        ("--config.num_drafted=-2", r"config\.num_drafted=-2; expected at least 0"),
        (
            "--config.draft_kv_heads=3",
            r"config\.draft_kv_heads=3 does not divide the 4 key/value .* nearest: 2, 4",
        ),
        ("--config.inputs_length=9999", r"a prompt of 9999 tokens and max_new_tokens=4 exceed .* expected at most"),
    ],
)
def test_bad_settings(run, monkeypatch, override, message):
    """Found before anything is measured."""
    monkeypatch.setattr(timing, "copy_bandwidth", None)
    with pytest.raises(InputError, match=message):
        run("--config.size=llama_mini", "--config.num_drafted=2", override)


def test_a_configuration_of_another_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["timing.py", f"--config={ROOT / 'configs/throughput/llama_2_7b.py'}"])
    with pytest.raises(InputError, match=r"has no weights; expected one such as configs/timing/t5_xxl\.py"):
        timing.main()
