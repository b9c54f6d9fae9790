import pytest

from gqa.data.docstrings import Docstrings, copy_the_name, function_pairs, module_pairs

SOURCE = '''"""Sums and more.

Of numbers.
"""
import math


class Sum:
    """Holds numbers."""

    def add(self, number):
        """Adds a number to the sum.

        Any number will do.
        """
        self.total += number
        return self

    def size(self):
        """Size."""
        return len(self)

    async def wait_for_all(self): "Waits until all are done."; return 3


def only_documented():
    """There is nothing else here."""


async def outer(
    x,
):
    r"""Calls inner on x."""

    def inner(y):
        "Gives y back again."
        return y

    return inner(x)
'''


def test_functions_without_their_docstrings():
    assert list(function_pairs(SOURCE)) == [
        {
            "inputs": "async def outer(\n    x,\n):\n\n    def inner(y):\n"
            '        "Gives y back again."\n        return y\n\n    return inner(x)',
            "targets": "Calls inner on x.",
        },
        {
            "inputs": "def add(self, number):\n    self.total += number\n    return self",
            "targets": "Adds a number to the sum.",
        },
        {"inputs": "def inner(y):\n    return y", "targets": "Gives y back again."},
    ]


def test_a_module_without_its_docstring():
    (pair,) = module_pairs(SOURCE)
    assert pair["targets"] == "Sums and more.\n\nOf numbers."
    assert pair["inputs"].startswith('import math\n\n\nclass Sum:\n    """Holds numbers."""\n')
    assert list(module_pairs('"""Nothing but a docstring."""\n')) == list(module_pairs("x = 1\n")) == []


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ("def get_user_name(self):\n    return 1", "Get user name."),
        ("async def __aexit__(self, *args):\n    return 1", "Aexit."),
        ("def parseHTTP[T](x):\n    return 1", "Parse h t t p."),
        ("x = 1", ""),
    ],
)
def test_the_name_in_words(inputs, name):
    assert copy_the_name(inputs) == name


def test_a_function_is_used_once_and_on_one_side(tmp_path):
    function = 'def f_{0}(x):\n    """Gives the number {0}."""\n    return {0}\n'
    for i in range(100):
        (tmp_path / f"{i}.py").write_text(f"# {i}\n" + function.format(i) + function.format(i // 4 + 1000))
    (tmp_path / "broken.py").write_text("def (:\n")
    source = Docstrings(str(tmp_path), modules=False)
    rows = {split: [row["targets"] for row in source.rows(split)] for split in ("train", "heldout")}
    assert len(set(rows["train"] + rows["heldout"])) == len(rows["train"] + rows["heldout"]) == 125
    assert rows["heldout"]
    assert sum(count["seen before"] for count in source.skipped.values()) == 75
    assert [count["no Python file"] for count in source.skipped.values()] in ([1, 0], [0, 1])
    assert rows["train"] == [row["targets"] for row in source.rows("train")]
