"""The notebooks run from the first cell to the last; what is committed of them was run so, and is fit to read."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = ROOT / "build" / "notebooks"
MOST_BYTES = 400_000
SECONDS = 600  # of a cell, after which it hangs


def problems(notebook: dict) -> list[str]:
    """What is wrong with an executed notebook, one line each."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    found = []
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once each, in their order")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("it has no picture")
    found += [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]
    found += ["a warning: " + "".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    shown = "".join(text for output in outputs for text in [*output.get("text", []), *_texts(output)])
    found += [
        f"a path of one machine: {path}"
        for path in re.findall(r"(?<![\w.])/(?:home|opt|root|tmp|usr|var|Users)/\S+", shown)
    ]
    return found


def _texts(output: dict) -> list[str]:
    return [line for kind, lines in output.get("data", {}).items() if kind.startswith("text/") for line in lines]


def _said(notebook: dict) -> list[str]:
    """The text of its outputs, pictures left out."""
    outputs = [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    return ["".join([*output.get("text", []), *_texts(output)]) for output in outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_fit_to_read(path):
    assert problems(json.loads(path.read_text(encoding="utf-8"))) == []
    assert path.stat().st_size < MOST_BYTES


def test_problems_are_seen():
    cell = dict(cell_type="code", execution_count=2, outputs=[])
    cell["outputs"] = [
        dict(output_type="stream", name="stderr", text=["UserWarning: old"]),
        dict(output_type="execute_result", data={"text/plain": ["read /home/me/file\n", "a / b"]}),
        dict(output_type="error", ename="KeyError", evalue="'x'"),
    ]
    assert problems({"cells": [cell]}) == [
        "its cells were not run once each, in their order",
        "it has no picture",
        "KeyError: 'x'",
        "a warning: UserWarning: old",
        "a path of one machine: /home/me/file",
    ]


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    """Leaves the executed notebook in build/notebooks, to read or to commit."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebooks")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    )
    # The tests' own settings of XLA trade speed for compile time.
    client.execute(env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"})
    notebook.metadata.language_info = {"name": "python"}
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, EXECUTED / path.name)
    executed = json.loads((EXECUTED / path.name).read_text(encoding="utf-8"))
    assert problems(executed) == []
    if path.stem == "6_paper_figures":  # of committed results: what is stored is what they give
        assert _said(executed) == _said(json.loads(path.read_text(encoding="utf-8")))
