"""What a run does when it is told to stop."""

import contextlib
import signal
from collections.abc import Iterator

import jax

from gqa import distributed

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped; the message says what was saved."""


class Signals:
    """Notes SIGINT and SIGTERM instead of dying, so that the step under way can end and be saved.

    In several processes JAX notes SIGTERM, and all of them stop after the same step.
    """

    def __init__(self):
        self.received: str | None = None
        self._interrupts = 0
        self._several = jax.process_count() > 1

    def __enter__(self):
        handlers = dict.fromkeys(STOPPING, self._note)
        if self._several:
            handlers = {signal.SIGINT: distributed.forward_interrupt}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def look(self, count: int) -> None:
        """Looks, in several processes, whether any of them got a signal; to be called at every step, counted up."""
        if self._several and distributed.stop_together(count):
            self.received = signal.SIGTERM.name

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:  # a second Ctrl-C does not wait; schedulers send SIGTERM more than once
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that what is half written goes: for the time before there is a state.

    In several processes SIGTERM stays with JAX.
    """
    if jax.process_count() > 1:
        yield
        return

    def stop(number, _frame):
        raise Interrupted(f"{signal.Signals(number).name} before the first step; the same command starts again")

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
