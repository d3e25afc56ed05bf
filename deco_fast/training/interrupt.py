"""Ctrl-C, SIGTERM and a closed terminal end a run after the current step, with its checkpoint
written."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from deco_fast.training.distributed import Processes

_ANSWER = b"\nstopping after this step and its checkpoint; Ctrl-C again stops at once, without it\n"


_DATA_FAILED = 1000  # above all signals


class Interrupt:
    """Which signal asked the run to stop, if any did.

    Attributes:
        signal: the first one.
        data_failed: whether a process can read no more of its data.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.data_failed = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def agree(self, processes: Processes, time_is_up: bool) -> bool:
        """Whether any process has to stop, or its time is up; all call it together.

        A signal that another process received, perhaps on another machine, becomes this one's, and
        so does its lack of data.
        """
        # Signals begin at 1.
        own = 0 if time_is_up else -1
        if self.data_failed:
            own = _DATA_FAILED
        elif self.signal is not None:
            own = self.signal
        number = processes.greatest(own)
        self.data_failed = number == _DATA_FAILED
        if 0 < number < _DATA_FAILED:
            self.signal = signal.Signals(number)
        return number >= 0

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as a shell reports a process that it ended; else 0."""
        return 128 + self.signal if self.signal is not None else 0


@contextmanager
def catch_interrupt(*, tell: bool = False) -> Iterator[Interrupt]:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying of them; SIGHUP not under nohup.

    A second Ctrl-C is not held back. A second SIGTERM is: a scheduler may send one to all processes
    and torchrun, who got it too, another to its own.

    Args:
        tell: answer the first Ctrl-C on stderr: a step may take long, and the second loses the
            checkpoint.
    """
    interrupt = Interrupt()
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        tells = tell and sys.__stderr__ is not None
        if tells and interrupt.signal is None and number == signal.SIGINT:
            # Not by print, which may be at work where the signal came.
            with suppress(OSError):
                os.write(2, _ANSWER)
        interrupt.signal = interrupt.signal or signal.Signals(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for caught in (signal.SIGINT, signal.SIGTERM, *_hang_up()):
        previous[caught] = signal.signal(caught, note)
    try:
        yield interrupt
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def _hang_up() -> tuple[signal.Signals, ...]:
    """SIGHUP, where there is one and nohup has not had it ignored."""
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return ()
    return (signal.SIGHUP,)
