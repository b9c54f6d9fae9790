"""Results of many prompts on disk as they come, so that an interrupted run goes on where it was."""

import fcntl
import json
from pathlib import Path
from typing import IO, Any

from gqa.errors import InputError


def open_journal(journal: IO[bytes], path: Path, identity: dict[str, Any]) -> dict[int, list[int]]:
    """What an interrupted run of the same `identity` has done; the journal ends with its last whole line.

    Args:
      journal: the file, open for appending and reading in binary; locked until it is closed.
      path: its name.
      identity: JSON of all that the results depend on.

    Raises `InputError` while another process writes the file, and for results of another identity.
    """
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is being written by another process; choose another --output") from None
    journal.seek(0)
    header, done, end = None, {}, 0
    for line in journal:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if entry is None:  # torn by a kill
            break
        if header is None and isinstance(entry, dict):
            header = entry
        elif header is not None and _is_result(entry):
            done[entry[0]] = entry[1]
        else:
            raise InputError(f"{path} is no journal of this command's; delete it or name another --output")
        end += len(line)
    if header != identity:
        if done:
            wrong = next(name for name in [*identity, *header] if header.get(name) != identity.get(name))
            raise InputError(f"{path} holds a run with another {wrong}; delete it or name another --output")
        journal.truncate(0)
        journal.write(json.dumps(identity).encode() + b"\n")
        journal.flush()
    else:
        journal.truncate(end)
    return done


def _is_result(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int) and isinstance(entry[1], list)


def append(journal: IO[bytes], number: int, tokens: list[int]) -> None:
    """Writes the result of a prompt."""
    journal.write(json.dumps([number, tokens]).encode() + b"\n")
    journal.flush()
