import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from experiments import gpu_timing
from gqa import models
from gqa.errors import InputError

ROOT = Path(__file__).parents[2]
# A machine with the core of the library only.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ml_collections", "seqio", "grain", "tensorflow", "torch", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
"""


@pytest.mark.full
def test_the_script_needs_the_core_only(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    environment = os.environ | dict(PYTHON=sys.executable, PYTHONPATH=path, JAX_PLATFORMS="cpu")
    command = [ROOT / "experiments" / "gpu_timing.sh", "--tiny", tmp_path / "out"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "no comparison with transformers" in found.stdout
    for part in gpu_timing.PARTS:
        config = gpu_timing.configuration(part, tiny=True)
        results = json.loads((tmp_path / "out" / part / "timing.json").read_text())
        assert [row["kv_heads"] for row in results["rows"]] == list(config.kv_heads)
        assert (tmp_path / "out" / part / "timing.png").exists()
    assert results["rows"][0]["mixed_prompts"]["num_prompts"] == 3 and "accepted" in results["rows"][0]["speculation"]


@pytest.mark.parametrize("part", gpu_timing.PARTS)
def test_shapes_are_possible(part):
    config = gpu_timing.configuration(part, tiny=False)
    sites = models.FAMILIES[models.family_of(models.size(config.size))].converted_sites
    for K in config.kv_heads:
        models.replace(models.size(config.size), **{f"{site}_kv_heads": K for site in sites})
    assert (config.inputs_length, config.new_tokens, config.max_batch_size) == (2048, 512, 32)  # GQA §3.1


def test_rows_that_would_end_late_are_not_started(monkeypatch):
    now = iter([0.0, 0.0, 40.0, 70.0, 105.0])
    monkeypatch.setattr(gpu_timing, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    clock = gpu_timing.Clock(seconds=110)
    # The longest row took 40 s.
    assert [clock.may_start() for _ in range(4)] == [True, True, True, False]


def test_an_output_that_exists_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_timing.py", f"--output={tmp_path}"])
    with pytest.raises(InputError, match="exists already; name a new folder"):
        gpu_timing.main()
