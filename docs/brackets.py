"""Docstrings are prose: `--a=X] [--b=Y` and `[B, T] [S]` in them are no links, as Markdown would have it."""

import re

import griffe


class LiteralBrackets(griffe.Extension):
    """Escapes the bracket that would make a link of two pairs of brackets, outside code."""

    def on_object(self, *, obj, **kwargs):
        """Of every module, class and function whose docstring the site shows."""
        if obj.docstring is not None:
            parts = obj.docstring.value.split("`")
            parts[::2] = [re.sub(r"\](\s?)\[", r"]\1\\[", part) for part in parts[::2]]
            obj.docstring.value = "`".join(parts)
