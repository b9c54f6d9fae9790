"""Rates of preparation and loader: what is measured, and how it is reported."""

import json
import sys

import pytest

from experiments import data_rates
from gqa.errors import InputError


def test_a_small_source(tiny_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_rates, "LOADED_BATCHES", 2)
    monkeypatch.setattr(data_rates, "ARTICLE", 100)
    options = [f"--source={tiny_corpus}", "--repeats=1", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["data_rates", *options])
    data_rates.main()
    result = json.loads((tmp_path / "data_rates.json").read_text())
    assert set(result["preparation"]) == {"text", "table of pairs"}
    for row in result["preparation"].values():
        (lists,), (prepared,) = row["seconds"]["lists"], row["seconds"]["preparation"]
        assert row["ratio"]["lists"] == pytest.approx(lists / prepared)
        assert row["tokens_per_second"]["preparation"] == pytest.approx(row["tokens"] / prepared)
    loader = result["loader"]
    assert loader["positions_per_second"] == pytest.approx(2 * 32 * (128 + 29) / loader["seconds"][0])
    assert loader["ratio"] == pytest.approx(loader["positions_per_second"] / loader["training_positions_per_second"])
    table = (tmp_path / "data_rates.md").read_text()
    assert table in capsys.readouterr().out and f"python -m experiments.data_rates {' '.join(options)}" in table


def test_bad_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_rates", "--repeats=0"])
    with pytest.raises(InputError, match="--repeats=0; expected at least 1"):
        data_rates.main()
