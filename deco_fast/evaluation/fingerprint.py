"""Which weights a network has, and which files a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deco_fast.data.folder import walk_folders


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors, the same on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_fingerprint(path: str | os.PathLike[str]) -> str:
    """A hash of the names, sizes and times of change of a file, or of all files under a folder.

    What `walk_folders` leaves out counts for nothing.

    Raises:
        UserError: a folder cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(Path(folder, name) for folder, names in walk_folders(path) for name in names)
    for file in files:
        if not file.is_file():  # nor what a link leads to
            continue
        status = file.stat()
        name = os.fsencode(file.relative_to(path))
        digest.update(name + f"\0{status.st_size} {status.st_mtime_ns};".encode())
    return digest.hexdigest()
