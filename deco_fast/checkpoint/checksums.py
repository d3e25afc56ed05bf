"""Checksums: whether what is read is what was written, and whether weights are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deco_fast.errors import UserError

CHECKSUMS_FILE = "checksums.json"
_PIECE = 2**22


def write_checksums(folder: Path) -> None:
    """Note size and checksum of every file in a folder, in a file beside them."""
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def has_noted_sizes(folder: Path) -> bool:
    """Whether every file that was noted is there in full; true where nothing was noted."""
    try:
        noted = _read(folder)
        return all(
            (folder / name).stat().st_size == entry["bytes"] for name, entry in noted.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damaged_file(folder: Path) -> str | None:
    """The first file whose content is not the one that was noted; reads all of them."""
    try:
        for name, entry in _read(folder).items():
            if _digest(folder / name) != entry["blake2b"]:
                return name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return CHECKSUMS_FILE
    return None


def check_undamaged(path: Path) -> None:
    """Read a file and see that its content is what was noted beside it, if something was.

    Raises:
        UserError: it is not.
    """
    try:
        noted: Any = _read(path.parent)
    except (OSError, ValueError):
        return
    entry = noted.get(path.name) if isinstance(noted, dict) else None
    # Others may have files of that name, with something else in them.
    expected = entry.get("blake2b") if isinstance(entry, dict) else None
    if isinstance(expected, str) and _digest(path) != expected:
        raise UserError(
            f"{path} is damaged: its checksum is not the one in {CHECKSUMS_FILE} beside it; "
            "restore it from a backup, or name an earlier checkpoint"
        )


def weights_checksum(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell two sets of weights apart, the same on any device.

    A sum over the bits of each tensor: exact in any order, and a moment's work for any size.

    Args:
        model: with parameters of 16 or 32 bits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(
            torch.int32 if parameter.element_size() == 4 else torch.int16
        )
        digest.update(f"{name} {tuple(bits.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CHECKSUMS_FILE
    # Checkpoints of before there were checksums have none.
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
