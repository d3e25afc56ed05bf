"""Telling from a file's first bytes what it is."""

from __future__ import annotations

import pickle
from pathlib import Path

from deco_fast.checkpoint.format import WEIGHTS, weights_file
from deco_fast.checkpoint.lightning import open_published
from deco_fast.checkpoint.source import Source, choose_weights, open_safetensors, unreadable
from deco_fast.errors import UserError
from deco_fast.interop.unpickle import CodeInPickleError, code_message, read_pickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""What a file of torch.save began with before version 1.6."""


def open_source(path: Path, weights: str | None) -> Source:
    """Open a checkpoint folder or file, as `locate` returns it.

    Args:
        path: a folder of ours, a safetensors file of ours, or a published .ckpt.
        weights: "ema", "model", or None for either, the average where there is one.

    Raises:
        UserError: it is not one of these, is damaged, or does not hold these weights.
    """
    if path.is_dir():
        held = [name for name in WEIGHTS if (path / weights_file(name)).exists()]
        path = path / weights_file(choose_weights(weights, held, path))
    start = _first_bytes(path)
    if start.startswith(b"PK"):
        return open_published(path, weights)
    if start[8:9] == b"{":
        return open_safetensors(path, weights)
    if start.startswith(b"\x80"):
        raise UserError(_describe_pickle(path))
    raise UserError(
        f"{path} is not a checkpoint ({'empty' if not start else f'it begins with {start!r}'}): "
        "name a checkpoint folder, a .safetensors file or a published .ckpt"
    )


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise unreadable(path, error) from error


def _describe_pickle(path: Path) -> str:
    """What to say of a pickle that is not in a zip archive: we read none of them."""
    with path.open("rb") as file:
        try:
            first = read_pickle(file)
            if first != _LEGACY_MAGIC:
                return (
                    f"{path} is a plain pickle and not a checkpoint: "
                    "name a checkpoint folder, a .safetensors file or a published .ckpt"
                )
            for _ in ("protocol", "system", "content"):
                read_pickle(file)
        except CodeInPickleError as error:
            return code_message(path, error)
        except pickle.UnpicklingError as error:
            return f"{path} is truncated or damaged: {error}; download or copy it again"
    return (
        f"{path} is in the format that torch had before version 1.6: "
        "load it with torch and save it again with torch.save"
    )
