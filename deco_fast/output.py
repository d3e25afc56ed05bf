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
    """A text stream that drops what cannot be written; "?" for what its encoding lacks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def close_up(self) -> None:
        """Flush, and leave nothing that Python would fail to flush at its end."""
        try:
            self._stream.flush()
        except OSError:
            _write_to_nowhere(self._stream)

    def _lose(self, error: OSError) -> None:
        # A full disk may have room again.
        if error.errno in _NOBODY_READS:
            _write_to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def enduring_output() -> Iterator[None]:
    """Inside, what is printed and cannot be written is lost, and nothing else."""
    before = sys.stdout, sys.stderr
    # None where the command was started without.
    streams = [None if stream is None else _EnduringStream(stream) for stream in before]
    sys.stdout, sys.stderr = cast(list[TextIO], streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            if stream is not None:
                stream.close_up()


def _write_to_nowhere(stream: TextIO) -> None:
    """Have what a stream keeps, and what it is given from here on, go nowhere."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
