"""Output that cannot be written does not end a command.

`train.py 2>&1 | tee log` and Ctrl-C: tee is gone first, and what the run says on its way to the
checkpoint would be an error. The same of a terminal that was closed and of a log on a full disk.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_NOBODY_READS = (errno.EPIPE, errno.EIO)


class _EnduringStream:
    """A text stream that drops what cannot be written; "?" for what its encoding lacks.

    Attributes:
        problem: why something was lost that somebody may wait for.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def close_up(self) -> None:
        """Flush, so that Python has nothing to flush at its end."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)
            _write_to_nowhere(self._stream.fileno())

    def _lose(self, error: OSError) -> None:
        if error.errno in _NOBODY_READS:
            _write_to_nowhere(self._stream.fileno())
        else:  # a full disk, which may have room again
            self.problem = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OutputError(OSError):
    """Something that was printed was not written, though somebody may wait for it."""


@contextmanager
def enduring_output() -> Iterator[None]:
    """Inside, what is printed and cannot be written is lost, and nothing else.

    Raises:
        OutputError: at the end, if something of stdout was lost but for want of a reader.
    """
    before = sys.stdout, sys.stderr
    streams = [_EnduringStream(stream or _nowhere(i)) for i, stream in enumerate(before, start=1)]
    sys.stdout, sys.stderr = cast(list[TextIO], streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.close_up()
    if (problem := streams[0].problem) is not None:
        raise OutputError(problem.errno, problem.strerror) from problem


def _nowhere(descriptor: int) -> TextIO:
    """For a command that was started without this stream: its number taken, for others write to
    it by that, and what else is opened could get it."""
    try:
        os.fstat(descriptor)
    except OSError:
        _write_to_nowhere(descriptor)
    return open(os.devnull, "w", encoding="utf-8")


def _write_to_nowhere(descriptor: int) -> None:
    """Have what is written to it go nowhere from here on."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
