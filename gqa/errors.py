"""Errors that a user can act on."""


class InputError(ValueError):
    """Bad input from a user: one line saying what was found, what was expected and the nearest valid choice.

    Command lines print the message and exit with code 2 (`gqa.command_line.run`); any other exception is a bug
    and keeps its traceback.
    """
