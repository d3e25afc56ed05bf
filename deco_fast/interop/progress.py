"""A progress bar for a file that a library writes in a single call."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from deco_fast.checkpoint.atomic import is_leftover

_INTERVAL = 0.2
"""Seconds between two looks at the disk."""


@contextmanager
def written_bytes_bar(folder: Path, total: int, description: str) -> Iterator[None]:
    """Show how much of `total` bytes has reached temporary files (`atomic_file`) in `folder`.

    Neither safetensors nor torch.save can be asked how far it is, but what grows on the disk can
    be seen. The bar is shown on terminals only.
    """
    before = set(_temporaries(folder))
    done = threading.Event()
    with tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=None) as bar:

        def watch() -> None:
            while not done.wait(_INTERVAL):
                new = [path for path in _temporaries(folder) if path not in before]
                bar.update(min(sum(map(_allocated, new)), total) - bar.n)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            bar.update(total - bar.n)
        finally:
            done.set()
            watcher.join()


def _temporaries(folder: Path) -> Iterator[Path]:
    for path in filter(is_leftover, folder.glob(".*")):
        yield from (path.rglob("*") if path.is_dir() else [path])


def _allocated(path: Path) -> int:
    """Bytes on the disk: a file can have its final size before anything is in it."""
    try:
        status = os.stat(path)
    except OSError:  # renamed since it was listed
        return 0
    return min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))
