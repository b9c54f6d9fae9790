"""The headline's runs: each share of uptraining has runs of its own, and a command that fails is named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import conversion_methods, measure, uptrain_full
from gqa.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the experiment with commands that write what theirs would: the loss of a run is 1 + its α."""

    def command(module, *arguments):
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        output = Path(options.get("output") or options["workdir"])
        if module == "gqa.evaluate":
            trained = Path(options["checkpoint"]).parent / "alpha"
            loss = 1 + float(trained.read_text()) if trained.exists() else {"MHA": 1.0}.get(output.stem, 3.0)
            output.write_text(json.dumps(dict(loss=loss, target_tokens=7, unigram_loss=5.0, corpus={})))
        else:
            output.mkdir(parents=True)
            (output / "finished.json").touch()
            (output / "alpha").write_text(options.get("config.uptrain.alpha", "2"))

    def start(*arguments):
        folders = [f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path}"]
        monkeypatch.setattr("sys.argv", ["uptrain_full", "--seeds=1", *folders, *arguments])
        uptrain_full.main()
        return json.loads((tmp_path / "results.json").read_text())

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(uptrain_full, "run", command)
    monkeypatch.setattr(measure, "machine", dict)
    monkeypatch.setattr(measure, "commit", str)
    return start


def test_another_share_has_its_own_runs(start):
    for alpha in (0.05, 0.1):
        rows = start(f"--alpha={alpha}")["rows"]
        assert [row["losses"] for row in rows if row["uptrained"]] == [[1 + alpha]] * 3


@pytest.mark.parametrize("alpha", ["0", "2", "nan"])
def test_shares_that_are_none_are_refused(alpha, start, tmp_path):
    with pytest.raises(InputError, match=r"--alpha=.*; expected a share of the pre-training above 0, up to 1"):
        start(f"--alpha={alpha}")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda words, **kwargs: SimpleNamespace(returncode=3))
    with pytest.raises(InputError, match=r"gqa\.evaluate ended with exit code 3"):
        uptrain_full.run("gqa.evaluate", "--output=scores.json")
    run = conversion_methods.Run("cross", "mean", 2, 0.05, 1, 1.0)
    bench = object.__new__(conversion_methods.Bench)
    bench._workdir, bench._uptraining, bench._alphas = tmp_path, tmp_path / "config.py", [0.05]
    bench._config = SimpleNamespace(
        optimizer=SimpleNamespace(learning_rate=1.0), uptrain=SimpleNamespace(original_steps=100)
    )
    (tmp_path / "uptraining" / run.name / "converted").mkdir(parents=True)
    with pytest.raises(InputError, match=r"gqa\.train ended with exit code 3"):
        bench._uptrain(run)
