"""Writing class folders as shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from deco_fast.checkpoint.atomic import atomic_file, remove_temporaries
from deco_fast.checkpoint.lock import alone_in
from deco_fast.data.folder import FolderImages
from deco_fast.data.names import fingerprint
from deco_fast.data.shards.locate import PLAN, packed_shards
from deco_fast.errors import UserError

CLASSES = "classes.json"


def pack(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    images_per_shard: int = 10_000,
    seed: int = 0,
) -> list[Path]:
    """Write the images below `folder/<class>/` as `out/shard-000000.tar` and so on.

    Each image becomes CLASS/NUMBER-NAME.jpg with its bytes as they are, and CLASS/NUMBER-NAME.cls
    with the number of its class; classes.json lists the classes. The images are shuffled over the
    shards, for readers that stream them. A shard is there whole or not at all, and one that is
    there is not written again: an interrupted call is repeated with the same arguments.

    Args:
        folder: as for `FolderImages`.
        out: a new folder, or one of an interrupted call.
        images_per_shard: in all but the last shard.
        seed: of the shuffling.

    Returns:
        The shards.

    Raises:
        UserError: as `FolderImages`; a file cannot be read or written; `out` holds something
            else, or shards of other images or arguments.
        ValueError: for fewer than one image per shard or a negative seed.
    """
    if images_per_shard < 1 or seed < 0:
        raise ValueError(
            f"images_per_shard is {images_per_shard}, seed {seed}: they begin at 1 and 0"
        )
    images, out = FolderImages(folder), Path(out)
    if out.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{out} is in {folder} itself: choose another folder for the shards")
    with alone_in(out):
        return _pack(images, out, images_per_shard, seed)


def _pack(images: FolderImages, out: Path, images_per_shard: int, seed: int) -> list[Path]:
    _open(out, images, {"images_per_shard": images_per_shard, "seed": seed})
    order = np.random.default_rng(seed).permutation(len(images.names))
    parts = np.split(order, range(images_per_shard, len(order), images_per_shard))
    shards = packed_shards(out, len(order), images_per_shard)
    done = sum(len(part) for part, shard in zip(parts, shards, strict=True) if shard.exists())
    with tqdm(
        total=len(order), initial=done, desc=f"packing {images.root}", unit="image", unit_scale=True
    ) as bar:
        for part, shard in zip(parts, shards, strict=True):
            if shard.exists():
                continue
            with atomic_file(shard) as temporary, tarfile.open(temporary, "w") as archive:
                for index in part.tolist():
                    _add(archive, images, index)
                    bar.update()
    return shards


def _open(out: Path, images: FolderImages, arguments: dict[str, int]) -> None:
    """Create the folder with its plan, or see that it is of the same call."""
    names_and_labels = fingerprint(images.names, images.labels)
    plan = {**arguments, "images": len(images.names), "fingerprint": names_and_labels}
    kept = out / PLAN
    if kept.exists():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{kept} cannot be read: choose another folder") from error
        if before != plan:
            raise UserError(
                f"{out} holds shards of other images or with other options: choose another folder"
            )
        remove_temporaries(out)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another folder for the shards")
    for name, content in ((CLASSES, images.classes), (PLAN, plan)):
        with atomic_file(out / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _add(archive: tarfile.TarFile, images: FolderImages, index: int) -> None:
    path = images.path(index)
    label = int(images.labels[index])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; restore or remove it") from error
    # What follows the first dot of a name is the field, so none may stand in the stem; the number
    # keeps a.jpg and a.png, or the same name in two subfolders, apart.
    stem = path.stem.replace(".", "_")
    key = f"{images.classes[label]}/{index:08d}-{stem}"
    _add_member(archive, f"{key}{path.suffix.lower()}", content)
    _add_member(archive, f"{key}.cls", str(label).encode())


def _add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)  # no time and no owner: the same images give the same bytes
    header.size = len(content)
    header.mode = 0o644
    stream: IO[bytes] = io.BytesIO(content)
    archive.addfile(header, stream)
