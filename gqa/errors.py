"""Errors that a user can act on, and the nearest valid choice that they name."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user: one line saying what was found, what was expected and the nearest valid choice.

    Command lines print the message and exit with code 2 (`gqa.command_line.run`); any other exception is a bug
    and keeps its traceback.
    """


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None when there is none to choose from."""
    found = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.0)
    return found[0] if found else None


def one_of(where: str, value: str, choices: Iterable[str]) -> None:
    """Raises `InputError`, naming the nearest, for a value that is none of the choices."""
    if value not in choices:
        raise InputError(
            f"{where}: unknown {value!r}; expected one of {', '.join(choices)}; nearest: {nearest(str(value), choices)}"
        )
