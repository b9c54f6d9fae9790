"""The site's generated parts say what the sources say, and the whole site builds without a warning."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gqa.posttraining.config import IterationsConfig, RejectionConfig
from gqa.training.config import RunConfig, TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_of_a_configuration_is_there_with_its_meaning(pages):
    reference = pages.config_reference()
    for where, kind in pages.sections("config", RunConfig):
        part = re.search(rf"^## {re.escape(where)}\n(.*?)(?=^## )", reference, re.MULTILINE | re.DOTALL)[1]
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == [field.name for field in dataclasses.fields(kind)]
    wheres = [where for where, _ in pages.sections("config", RunConfig)]
    assert {"config", "config.train", "config.uptrain", "config.uptrain.merge", "config.mesh"} <= set(wheres)
    row = "| `z_loss` | `float` |  | coefficient of log(Z)^2 (T5: 1e-4) |"
    assert row in reference and pages.comments(TrainConfig)["batch_size"] == "rows a step, over all devices"
    assert "| `skip_above` | `float or None` | `None` |" in reference
    for where in ("gqa.ppo: config.ppo", "gqa.instructions: config.judge", "gqa.data.clean: config.pair"):
        assert f"\n## {where}\n" in reference
    assert "| `kl_limit` | `float` |" in reference
    assert "\n## gqa.ppo: config.mesh\n\nAs `config.mesh`.\n" in reference
    assert {"policy", "reward", "heldout"} <= {*pages.comments(RejectionConfig), *pages.comments(IterationsConfig)}


def test_sections_of_the_readme_and_links(pages):
    assert "make quickstart" in pages.section("See it work")
    own = pages.section("Your own checkpoint")
    assert "# 4. Give it to others" in own and "| know that two are the same function |" in own and "\n## " not in own
    with pytest.raises(ValueError, match="no heading 'Nowhere'"):
        pages.section("Nowhere")
    text = pages.expand("[x](../gqa/plan.py) [y](scaling.md#gpus) ![z](../assets/teacher_curve.png) [w](https://a.b/c)")
    assert text == "x [y](scaling.md#gpus) ![z](repository/assets/teacher_curve.png) [w](https://a.b/c)"


def test_every_command_is_there(pages):
    commands = pages.commands()
    for module in ("gqa.train", "gqa.data.tasks", "checkpoints_tools.convert", "experiments.figures"):
        assert f"## {module}\n" in commands


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_commands_of_the_reproduction_are_those_of_make_miniature(tmp_path):
    def started(script: str) -> set[str]:
        """The commands of a script, as the shell expands them."""
        said = ["bash", "-c", 'python() { echo "python $*"; }\n' + script]
        lines = subprocess.run(said, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
        return {line for line in lines if line.startswith(("python -m experiments", "python -m gqa"))}

    # As typed, not as part of the make that runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    dry = ["make", "--dry-run", "--no-print-directory", "miniature"]
    made = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout
    made = made[made.index("mkdir -p runs/miniature") :].replace(".venv/bin/python", "python")
    page = (ROOT / "docs" / "reproduction.md").read_text()
    page = page[page.index(" python -m", page.index("or one by one")) : page.index("For a checkpoint of your own")]
    assert len(started(made)) > 12 and started(page) == started(made)


# Row of the page -> folder of the sweep, its teacher, the score.
KEPT = {
    "accuracy of recall [R]": ("recall", "recall", "accuracy"),
    "accuracy on Python source [D]": ("docstring", "t5", "accuracy"),
    "the same, teacher of half the width [S]": ("sizes", "t5_small", "accuracy"),
    "functions' docstrings, ROUGE-1 [D]": ("docstring", "t5", "docstring rouge1"),
    "functions' docstrings, ROUGE-2 [D]": ("docstring", "t5", "docstring rouge2"),
    "modules' docstrings, ROUGE-1 [L]": ("long_docstring", "t5", "long_docstring rouge1"),
    "modules' docstrings, ROUGE-2 [L]": ("long_docstring", "t5", "long_docstring rouge2"),
    "functions' docstrings, loss [D]": ("docstring", "t5", "docstring loss"),
    "modules' docstrings, loss [L]": ("long_docstring", "t5", "long_docstring loss"),
}


@pytest.mark.parametrize("row", KEPT)
def test_what_the_reproduction_says_is_kept_are_the_results(row):
    folder, teacher, score = KEPT[row]
    results = json.loads((ROOT / "experiments" / "results" / "miniature" / folder / "results.json").read_text())
    scores = {
        (run["method"], run["kv_heads"], run["seed"]): run[score]
        for run in results["runs"]
        if run["teacher"] == teacher and run["alpha"] == 0.05
    }
    expected = []
    for kv_heads in (2, 1):
        for method in ("mean", "svd+group+refit"):
            pairs = [
                (scores[method, kv_heads, seed], scores["none", 8, seed])
                for seed in (1, 2, 3)
                if (method, kv_heads, seed) in scores
            ]
            if score.endswith(" loss"):
                kept, digits = [own - teachers for own, teachers in pairs], "+.3f"
            else:
                kept, digits = [100 * own / teachers for own, teachers in pairs], ".1f"
            expected.append(f"{np.mean(kept):{digits}} ± {np.std(kept, ddof=1):{digits[-3:]}}" if kept else "")
    page = (ROOT / "docs" / "reproduction.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {row} |"))
    assert [cell.strip() for cell in line.strip("|").split("|")[1:]] == expected


def test_every_page_is_in_the_navigation():
    named = re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path / 'site'}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert "make quickstart" in page and "{{" not in page
    # Nothing is fetched from elsewhere when a page opens.
    fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page)
    assert fetched == []
    api = (tmp_path / "site" / "api" / "convert.html").read_text()
    assert "gqa.convert.pooling" in api


def test_the_tree_of_the_readme_names_every_module():
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    modules = [path for folder in ("gqa", "checkpoints_tools", "experiments") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in modules if not path.name.startswith("__") and path.name not in tree] == []
