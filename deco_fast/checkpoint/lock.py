"""One program at a time in a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deco_fast.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other programs that call this from writing to a folder; its end ends with the program.

    The folder itself is locked, so nothing is left behind: not even the folder, if it was made here
    and stayed empty. Where the system cannot lock (Windows, some network disks) nobody is kept off.

    Raises:
        UserError: another one is in it, or it cannot be made.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): choose another folder"
        ) from error
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(
                        f"{folder} is in use by another program: wait for its end, or choose "
                        "another folder"
                    ) from error
        yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()
        if handle is not None:
            os.close(handle)
