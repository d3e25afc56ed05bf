"""Many names in little memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Names:
    """A sequence of strings held in two tensors.

    A million Python strings would take 100 MB in every worker process, and time to be pickled.
    Tensors move into shared memory when the first worker starts, and each gets a handle.

    Args:
        names: bytes as the file system has them.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        listed = list(names)
        joined = np.frombuffer(b"".join(listed), dtype=np.uint8)
        ends = np.cumsum([len(name) for name in listed], dtype=np.int64)
        self._bytes = torch.from_numpy(joined.copy())  # which bytes would make read-only
        self._ends = torch.from_numpy(ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """Name `index`, 0 to the number of names - 1."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])].numpy().tobytes())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All that distinguishes these names from others."""
        return self._bytes, self._ends


def fingerprint(names: Names, labels: Tensor) -> str:
    """A hash of which samples there are, in their order, whatever folder they lie in."""
    digest = hashlib.sha256()
    for tensor in (labels, *names.tensors()):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
