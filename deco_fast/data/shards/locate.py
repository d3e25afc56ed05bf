"""Which files a set of shards consists of."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from deco_fast.errors import UserError

PLAN = "pack.json"
"""What `pack` is writing, beside its shards."""


def packed_shards(folder: Path, images: int, images_per_shard: int) -> list[Path]:
    """The shards that `pack` makes of so many images."""
    return [folder / f"shard-{number:06d}.tar" for number in range(-(-images // images_per_shard))]


def find_shards(root: str | Sequence[str]) -> list[Path]:
    """The tar files that `root` names, in the order of a list, else sorted.

    Args:
        root: a folder (every .tar below it; names that begin with a dot are ignored), a tar
            file, a pattern such as `train-{000000..000146}.tar`, or a list of these.

    Raises:
        UserError: a file is missing, is compressed, is not local or is named twice, a folder has
            no .tar or not all that `pack` was to write there, or there is nothing at all.
    """
    specifications = [root] if isinstance(root, str) else list(root)
    shards = [shard for each in specifications for shard in _expand(each)]
    if not shards:
        raise UserError("data.root names no shards: give a folder of .tar files or a pattern")
    seen: set[Path] = set()
    for shard in shards:
        if shard in seen:
            raise UserError(f"shard {shard} is named twice: its images would count twice")
        seen.add(shard)
    return shards


def _expand(specification: str) -> list[Path]:
    if specification.startswith("pipe:") or "://" in specification:
        # A pipe would run a shell command out of a configuration file, and neither can be read at
        # random places.
        raise UserError(f"{specification}: shards must be local files: download them first")
    # Before the braces: they are valid in a folder's name.
    specification = os.path.expanduser(specification)
    if os.path.isdir(specification):
        return _below(Path(specification))
    try:
        paths = [Path(name) for name in braceexpand(specification)]
    except ValueError as error:
        raise UserError(f"{specification}: its braces do not match ({error})") from error
    for path in paths:
        if not path.is_file():
            raise UserError(f"shard {path} does not exist: check the path, or download it again")
        if path.suffix != ".tar":
            raise UserError(
                f"{path} is no .tar: shards are read at random places, which a compressed file "
                "does not allow; decompress it"
            )
    return paths


def _below(folder: Path) -> list[Path]:
    shards: list[Path] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {error.strerror}")

    for parent, subfolders, files in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        shards += [Path(parent, name) for name in files if name.endswith(".tar") and name[0] != "."]
    if not shards:
        raise UserError(f"folder {folder} has no .tar files: put the shards there")
    _check_packed(folder)
    return sorted(shards)


def _check_packed(folder: Path) -> None:
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        expected = packed_shards(folder, plan["images"], plan["images_per_shard"])
    except (OSError, ValueError, KeyError, TypeError):  # packed by other means
        return
    missing = [shard.name for shard in expected if not shard.exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(expected)} shards, {missing[0]} first: type "
            f"the pack command again, or remove {PLAN} to do without"
        )
