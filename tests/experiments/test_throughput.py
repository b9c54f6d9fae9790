import json
import sys
from pathlib import Path

import pytest

from experiments import throughput
from gqa import models
from gqa.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function (overrides, memory) that measures the mini Llama in 1.5 MB."""
    config = tmp_path / "config.py"
    values = dict(size="llama_mini", changes={}, kv_heads=(1, 4), dtype="float32")
    values |= dict(context=16, new_tokens=4, repetitions=2)

    def run(*overrides, memory_gb=1.5e-3):
        content = values | {"memory_gb": memory_gb}
        config.write_text(
            f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({content!r})\n"
        )
        monkeypatch.setattr(sys, "argv", ["throughput.py", f"--config={config}", *overrides])
        throughput.main()

    return run


def test_batches_double_until_the_memory_is_full(run, tmp_path, capsys):
    run(f"--output={tmp_path / 'out'}")
    results = json.loads((tmp_path / "out" / "throughput.json").read_text())
    assert results["memory_bytes"] == 1_500_000
    sizes = {}
    architecture = models.size("llama_mini")
    for K in (1, 4):
        rows = [row for row in results["rows"] if row["kv_heads"] == K]
        sizes[K] = [row["batch_size"] for row in rows]
        assert sizes[K] == [2**i for i in range(len(rows))]
        assert [row["tokens_per_second"] is not None for row in rows] == [True] * (len(rows) - 1) + [False]
        assert [row["bytes"] <= 1_500_000 for row in rows] == [True] * (len(rows) - 1) + [False]
        # A row's keys and values: float32, of the prompt and of the new tokens but the last.
        cache = 2 * architecture.num_layers * K * architecture.head_dim * 4 * (16 + 4 - 1)
        before, last = rows[-2:]
        assert last["bytes"] - before["bytes"] > before["batch_size"] * cache
        for row in rows[:-1]:
            assert row["tokens_per_second"] == pytest.approx(1000 * row["batch_size"] / row["step_ms"])
            slowest, fastest = row["tokens_per_second_range"]
            assert slowest <= row["tokens_per_second"] <= fastest
    assert len(sizes[1]) > len(sizes[4]) > 2
    assert (tmp_path / "out" / "throughput.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert "does not fit" in table and "K = 4: tokens/s" in table


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.context=0", "config.context=0; expected at least 1"),
        ("--config.context=100000", "is longer than the model has positions for; nearest: "),
        ("--config.new_tokens=99999", "config.new_tokens=99999 are more than the model has positions for; nearest: "),
        ("--config.kv_heads=", "config.kv_heads=(); expected at least one number of heads"),
        ("--config.size=t5_1_1_mini", "config.size=t5_1_1_mini is no decoder; expected one, such as llama_2_7b"),
        ("--config.size=t5_1_1_base", "config.size=t5_1_1_base is no decoder; expected one, such as llama_2_7b"),
        ("--config.memory_gb=-1.0", "config.memory_gb=-1.0; expected a positive number"),
        ("--config.memory_gb=nan", "config.memory_gb=nan; expected a positive number"),
        ("--config.dtype=float16", "config.dtype: unknown 'float16'; expected one of float32, bfloat16"),
        ("--config.kv_heads=(3,)", "3"),
    ],
)
def test_bad_input(run, tmp_path, override, message):
    with pytest.raises(InputError) as error:
        run(override, f"--output={tmp_path / 'out'}")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_another_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["throughput.py", f"--config={ROOT / 'configs/timing/llama_small.py'}"])
    with pytest.raises(InputError, match=r"has no memory_gb; expected one such as configs/throughput/"):
        throughput.main()


def test_a_cpu_needs_a_limit(run):
    with pytest.raises(InputError, match=r"config\.memory_gb: None is for a device with a memory of its own"):
        run(memory_gb=None)
