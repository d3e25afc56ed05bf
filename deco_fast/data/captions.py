"""Images with captions from any source, decoded and cropped (specification B.12)."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from tqdm import tqdm

from deco_fast.data.folder import IMAGE_SUFFIXES, walk_images
from deco_fast.data.images import DecodedImages, Shortfall
from deco_fast.data.names import Names, fingerprint
from deco_fast.data.transforms import Crop
from deco_fast.errors import UserError

_NO_LABELS = torch.empty(0, dtype=torch.int64)


class CaptionSource(Protocol):
    """Encoded images and their captions at random access; see `ImageSource`."""

    description: str
    names: Names
    lost: tuple[str, ...]
    lost_images: int

    def read(self, index: int) -> bytes:
        """The encoded image `index`.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def caption(self, index: int) -> str:
        """The caption of image `index`.

        Raises:
            OSError, UnicodeDecodeError: it cannot be read.
        """
        ...


class CaptionedImages(DecodedImages):
    """The images of a source, cropped, with their captions.

    An image or a caption that cannot be read is skipped as in `ImageDataset`. So is an image that
    would have to be enlarged, where that is asked for; it is no damage.

    Args:
        source: images and captions.
        height, width: of the images handed out, in pixels.
        random_flip, max_damaged_share: as for `ImageDataset`.
        crop: how an image is brought to size.
        skip_small: pass over images of which a side is shorter than wanted.
    """

    source: CaptionSource

    def __init__(
        self,
        source: CaptionSource,
        height: int,
        width: int,
        random_flip: bool = False,
        max_damaged_share: float = 0.01,
        *,
        crop: Crop = "adm",
        skip_small: bool = False,
    ) -> None:
        super().__init__(source, height, width, random_flip, max_damaged_share, crop)
        self.skip_small = skip_small

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images' names in their order, which a resumed run relies on."""
        return fingerprint(self.source.names, _NO_LABELS)

    def _condition(self, image_index: int) -> str:
        return self.source.caption(image_index).strip()

    def _check(self, image: Image.Image) -> None:
        if self.skip_small and (image.width < self.width or image.height < self.height):
            raise Shortfall(f"{image.height}×{image.width} pixels are fewer than wanted")


class FolderCaptions:
    """Every image below a folder that has its caption beside it, `IMAGE.txt`: a `CaptionSource`.

    Images are ordered by path. Names that begin with a dot are ignored. An image without a caption
    is named in `lost`.

    Args:
        root: the folder.

    Attributes:
        names: the paths of the images relative to `root`.

    Raises:
        UserError: if `root` is missing or unreadable, or has no image with a caption.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self.description = str(root)
        if not self.root.is_dir():
            what = "is no folder" if self.root.exists() else "does not exist"
            raise UserError(f"image folder {root} {what}: check the path")
        found: list[bytes] = []
        lost = []
        bar = tqdm(desc=f"listing {root}", unit="image", delay=2, leave=False)
        for image, has_caption in walk_images(self.root, beside=".txt"):
            bar.update()
            if has_caption:
                found.append(image)
            else:
                lost.append(f"{os.fsdecode(image)}: no caption")
        bar.close()
        if not found:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise UserError(
                f"image folder {root} has no image ({suffixes}) with a caption: put NAME.txt "
                "beside each NAME.jpg"
            )
        self.names = Names(sorted(found))
        self.lost = tuple(sorted(lost))
        self.lost_images = len(lost)

    def read(self, index: int) -> bytes:
        """The file of image `index`.

        Raises:
            OSError: it cannot be read.
        """
        return (self.root / self.names[index]).read_bytes()

    def caption(self, index: int) -> str:
        """The text beside image `index`.

        Raises:
            OSError, UnicodeDecodeError: it cannot be read.
        """
        path = self.root / self.names[index]
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig")
