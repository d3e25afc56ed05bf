"""Features on disk: what the frozen encoder said of an image need not be computed again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deco_fast.errors import UserError

_log = logging.getLogger(__name__)

DTYPE = torch.float16
"""Of cached features; a layer norm keeps them far inside its range, and bfloat16 is coarser."""

_GIB = 2**30
_UNWRITTEN = 0


class FeatureCache:
    """Features (tokens, channels) of a data set's samples in one sparse file, filled as they come.

    A sample's features are written first and then marked with their checksum in a second file:
    what an interrupt or a power cut left half-written is not marked, or fails the check, and is
    computed again. So any number of processes may share the folder, and threads an instance.

    Args:
        folder: where caches lie; each identity gets a folder of its own in it.
        identity: everything that the features depend on, as JSON types.
        count: samples, where a mirrored image is a sample of its own.
        shape: (tokens, channels) of one sample's features.
        limit: the most bytes that the file may ever take.

    Attributes:
        path: the folder of this identity.
        size: bytes when full.
        damaged: the samples whose features failed their check.

    Raises:
        UserError: it would be larger than `limit` or the disk, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, object],
        count: int,
        shape: tuple[int, int],
        limit: int,
    ) -> None:
        description = json.dumps({**identity, "count": count, "shape": shape}, sort_keys=True)
        key = hashlib.sha256(description.encode()).hexdigest()[:16]
        self.path = Path(folder).expanduser() / key
        self.count = count
        self.shape = shape
        self._entry = shape[0] * shape[1] * DTYPE.itemsize
        self.size = count * self._entry
        self.damaged: set[int] = set()
        self._writable = True
        if not hasattr(os, "preadv"):
            raise UserError("alignment.cache needs Linux or macOS: leave it out")
        if self.size > limit:
            raise UserError(
                f"alignment.cache would take {self.size / _GIB:.3g} GiB for {count:,} samples, "
                f"more than alignment.cache_gib {limit / _GIB:g}: raise it, or leave the cache out"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "identity.json").write_text(description + "\n", encoding="utf-8")
            for name, length in (("features", self.size), ("checksums", 4 * count)):
                with (self.path / name).open("ab") as file:
                    file.truncate(length)
            # Not mapped into memory: there a full disk or a file cut short kills the process.
            self._features = os.open(self.path / "features", os.O_RDWR)
            self._checksums = os.open(self.path / "checksums", os.O_RDWR)
            missing = self.size - 512 * (self.path / "features").stat().st_blocks
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise UserError(
                f"alignment.cache {folder} cannot be written ({error.strerror or error}): "
                "choose another folder, or leave the cache out"
            ) from error
        if missing > free:
            raise UserError(
                f"alignment.cache needs {missing / _GIB:.3g} GiB more in {folder}, where "
                f"{free / _GIB:.3g} GiB are free: choose another folder, or leave the cache out"
            )

    def __del__(self) -> None:
        for file in (getattr(self, "_features", None), getattr(self, "_checksums", None)):
            if file is not None:
                os.close(file)

    def read(self, index: int) -> Tensor | None:
        """The features of a sample, (tokens, channels) float16; None if they are not there.

        Damaged ones count as absent.
        """
        mark = np.zeros(1, np.uint32)
        entry = np.zeros(self.shape, np.float16)
        try:
            os.preadv(self._checksums, [mark.data], index * mark.itemsize)
            if mark[0] == _UNWRITTEN:
                return None
            os.preadv(self._features, [entry.data], index * self._entry)
        except OSError:  # of the disk; what is read is then not what was written
            mark[0] = _UNWRITTEN
        if _checksum(entry) != mark[0]:
            if not self.damaged:
                _log.warning("alignment.cache %s is damaged: what is, is computed anew", self.path)
            self.damaged.add(index)
            return None
        return torch.from_numpy(entry)

    def write(self, indices: Sequence[int], features: Tensor) -> None:
        """Store features (B, tokens, channels) of these samples, rounded to float16.

        A full disk is reported once, and from then on nothing is stored.
        """
        if not self._writable:
            return
        entries = features.detach().to("cpu", DTYPE).contiguous().numpy()
        try:
            for index, entry in zip(indices, entries, strict=True):
                _write_all(self._features, entry.tobytes(), index * self._entry)
                mark = np.uint32(_checksum(entry)).tobytes()
                _write_all(self._checksums, mark, index * len(mark))
        except OSError as error:
            self._writable = False
            _log.warning(
                "alignment.cache %s cannot be written (%s): features are computed from here on",
                self.path,
                error.strerror,
            )

    @property
    def filled(self) -> int:
        """Samples whose features are there."""
        return int(np.count_nonzero(np.fromfile(self.path / "checksums", np.uint32)))


def _checksum(entry: np.ndarray) -> int:
    return zlib.crc32(entry.tobytes()) or 1  # 0 marks what was never written


def _write_all(file: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], offset + written)
