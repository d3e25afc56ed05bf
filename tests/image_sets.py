"""Small image sets on the disk, as folders and as shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def encoded(shade: int, ending: str = "png", size: tuple[int, int] = (20, 20)) -> bytes:
    """An image file of one shade of grey, 0 to 255."""
    content = io.BytesIO()
    kind = {"jpg": "jpeg"}.get(ending.lower(), ending.lower())
    Image.new("RGB", size, (shade, shade, shade)).save(content, kind)
    return content.getvalue()


def noise(seed: int, ending: str = "png", size: tuple[int, int] = (24, 20)) -> bytes:
    """An image file that differs from its mirror image and from those of other seeds."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, {"jpg": "jpeg"}.get(ending, ending))
    return content.getvalue()


def write(path: Path, content: bytes) -> None:
    """A file, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def shade_of(pixels: Tensor) -> int:
    """What `encoded` was given, from uint8 pixels."""
    return round(float(pixels.float().mean()))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> list[int]:
    """A tar file of these members; returns where each member's header begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    with tarfile.open(path) as archive:
        return [info.offset for info in archive]


def sample(key: str, shade: int, label: int, how: str = "cls") -> list[tuple[str, bytes]]:
    """The members of one sample: an image and its label."""
    described = {"cls": str(label), "json": json.dumps({"label": label, "width": 20})}
    return [(f"{key}.png", encoded(shade)), (f"{key}.{how}", described[how].encode())]
