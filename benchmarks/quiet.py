"""Several processes prepare at once, and one measures while all others are still.

Compiling keeps a processor busy and a GPU idle. So the pieces of a record may run side by side
(`python -m benchmarks.record OUT --jobs 6`), with a file between them as a lock: whoever prepares
holds it with the others, whoever measures holds it alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_VARIABLE = "DECO_BENCHMARK_LOCK"
"""The environment variable with the lock's path; without it nobody else measures."""


@contextlib.contextmanager
def preparing(lock: Path | None = None) -> Iterator[None]:
    """While this is held, nobody measures."""
    with _locked(exclusively=False, lock=lock):
        yield


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """While this is held, nobody else prepares or measures."""
    with _locked(exclusively=True):
        yield


@contextlib.contextmanager
def _locked(exclusively: bool, lock: Path | None = None) -> Iterator[None]:
    path = lock or os.environ.get(LOCK_VARIABLE)
    if not path or fcntl is None:
        yield
        return
    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH)
        yield
