"""Npz files from anywhere: what is in them, and how their damage shows."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

READ_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy, zipfile and what they give raise for a damaged, an encrypted or another file."""


def npz_keys(path: Path) -> set[str]:
    """The names of the arrays in an npz file; none where it cannot be read as one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except READ_ERRORS:
        return set()
    return {name.removesuffix(".npy") for name in names if name.endswith(".npy")}
