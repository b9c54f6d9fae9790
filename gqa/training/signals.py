"""What a run does when it is told to stop."""

import contextlib
import signal
from collections.abc import Iterator

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped; the message says what was saved."""


class Signals:
    """Notes SIGINT and SIGTERM instead of dying, so that the step under way can end and be saved."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.received:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that what is half written goes: for the time before there is a state."""

    def stop(number, _frame):
        raise Interrupted(f"{signal.Signals(number).name} before the first step; the same command starts again")

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
