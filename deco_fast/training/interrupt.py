"""Ctrl-C and SIGTERM end a run after the current step, with its checkpoint written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """Which signal asked the run to stop, if any did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as a shell reports a process that it ended; else 0."""
        return 128 + self.signal if self.signal is not None else 0


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one is not held back."""
    interrupt = Interrupt()
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = signal.Signals(number)
        for caught, handler in previous.items():
            signal.signal(caught, handler)

    for caught in (signal.SIGINT, signal.SIGTERM):
        previous[caught] = signal.signal(caught, note)
    try:
        yield interrupt
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
