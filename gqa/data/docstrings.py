"""Pairs with real references from Python source: a function and its summary, a module and its docstring.

| task | inputs | targets |
|---|---|---|
| `docstring` | a function without its docstring | the first line of its docstring |
| `long_docstring` | a module without its docstring | the docstring |

A file is on the side of the split that `gqa.data.corpus` puts it on. Functions that occur in several files, as vendored
ones do, are used once, and never on both sides.
"""

import ast
import hashlib
import random
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator

from gqa.data.corpus import Corpus

_LEAST_WORDS = 3  # of a docstring; a shorter one says nothing that could be scored
_LEAST_LINES = 2  # of a function without its docstring


class Docstrings:
    """Rows `{"inputs", "targets"}` of the Python files of a text source; `modules`: of `long_docstring`.

    Raises `InputError` as `Corpus` does.
    """

    splits = ("train", "heldout")

    def __init__(self, source: str, *, modules: bool):
        self._corpus, self._modules = Corpus(source), modules
        self._trained: frozenset[bytes] | None = None  # hashes of what the train split has, once they are known
        self.skipped: dict[str, Counter] = {split: Counter() for split in self.splits}

    def digest(self, split: str) -> str:
        """That of the source's documents."""
        return self._corpus.digest(split)

    def rows(self, split: str) -> Iterator[dict[str, str]]:
        """The pairs of a split, file by file in a fixed random order."""
        skipped = self.skipped[split] = Counter()
        if split != "train" and self._trained is None:
            self._trained = frozenset(map(_hash, self._all("train", Counter())))
        seen = set() if split == "train" else set(self._trained)
        for row in self._all(split, skipped):
            if _hash(row) in seen:
                skipped["seen before"] += 1
            else:
                seen.add(_hash(row))
                yield row
        if split == "train":
            self._trained = frozenset(seen)

    def _all(self, split: str, skipped: Counter) -> Iterator[dict[str, str]]:
        pairs = module_pairs if self._modules else function_pairs
        names = self._corpus.names(split)
        random.Random(0).shuffle(names)  # the first few then stand for all
        for name in names:
            try:
                yield from pairs(self._corpus.read(name).text)
            except (SyntaxError, ValueError, RecursionError):
                skipped["no Python file"] += 1


def function_pairs(source: str) -> Iterator[dict[str, str]]:
    """Each function of a file that has a docstring of a few words and a body beside it, dedented, in order."""
    lines = source.split("\n")
    for node in ast.walk(_parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not _has_docstring(node):
            continue
        summary = ast.get_docstring(node).split("\n")[0].strip()
        first, last = node.lineno - 1, node.end_lineno
        docstring = node.body[0]
        if docstring.lineno == node.lineno or len(node.body) == 1 or node.body[1].lineno <= docstring.end_lineno:
            continue  # all on one line, or nothing but a docstring
        kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : last]
        inputs = textwrap.dedent("\n".join(kept)).strip()
        if len(summary.split()) >= _LEAST_WORDS and inputs.count("\n") + 1 >= _LEAST_LINES:
            yield {"inputs": inputs, "targets": summary}


def module_pairs(source: str) -> Iterator[dict[str, str]]:
    """The file and its docstring, if it has one and more than that."""
    module = _parse(source)
    if not _has_docstring(module) or len(module.body) == 1:
        return
    docstring = module.body[0]
    lines = source.split("\n")
    inputs = "\n".join(lines[: docstring.lineno - 1] + lines[docstring.end_lineno :]).strip()
    targets = ast.get_docstring(module).strip()
    if len(targets.split()) >= _LEAST_WORDS and inputs:
        yield {"inputs": inputs, "targets": targets}


def copy_the_name(inputs: str) -> str:
    """The baseline of `docstring`: the function's name in words, `get_user_name` as `Get user name.`"""
    for line in inputs.split("\n"):
        words = line.split()
        if words[:2] == ["async", "def"]:
            words = words[1:]
        if len(words) > 1 and words[0] == "def":
            name = words[1].split("(")[0].split("[")[0]
            spaced = "".join(f" {c.lower()}" if c.isupper() else c for c in name).replace("_", " ")
            return " ".join(spaced.split()).capitalize() + "."
    return ""


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in other people's source
        return ast.parse(source)


def _has_docstring(node: ast.AST) -> bool:
    return bool(ast.get_docstring(node, clean=False))


def _hash(row: dict[str, str]) -> bytes:
    return hashlib.sha256(row["inputs"].encode()).digest()[:12]
