from pathlib import Path

import pytest

from gqa.data.prepare import PrepareSpec, prepare

VOCABULARY = Path(__file__).parents[2] / "assets" / "vocabulary" / "python_4096.model"


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """120 small Python files of different lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(120):
        lines = [f"def function_{i}_{j}(x):\n    return x * {j} + {i}\n" for j in range(1 + 7 * i % 23)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_spec(corpus_folder):
    def make(task, **changes):
        spec = {
            "source": str(corpus_folder),
            "vocabulary": str(VOCABULARY),
            "inputs_length": 64,
            "targets_length": None,
        }
        return PrepareSpec(task=task, **{**spec, **changes})

    return make


@pytest.fixture(scope="session")
def records(make_spec, tmp_path_factory):
    """task -> a folder of its records, made once."""
    folders = {}

    def get(task):
        if task not in folders:
            folders[task] = tmp_path_factory.mktemp("records") / task
            prepare(make_spec(task), folders[task])
        return folders[task]

    return get
