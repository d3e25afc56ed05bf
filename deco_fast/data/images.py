"""Images and labels from any source, decoded and cropped, damaged ones replaced."""

from __future__ import annotations

import io
from functools import cached_property
from typing import Protocol

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deco_fast.data.damage import DamageRecord
from deco_fast.data.names import Names, fingerprint
from deco_fast.data.transforms import centre_crop, to_pixels, to_rgb
from deco_fast.errors import UserError

# So many in a row are no stray damage but a lost disk or a wrong folder.
_DAMAGED_IN_A_ROW = 100


class ImageSource(Protocol):
    """Encoded images at random access.

    Attributes:
        description: where they come from, for messages.
        names: of the images, in their order.
        labels: (images,) int64.
        lost: what was found damaged when the source was opened, name and reason.
        lost_images: how many images are missing for it.
    """

    description: str
    names: Names
    labels: Tensor
    lost: tuple[str, ...]
    lost_images: int

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image `index`.

        Raises:
            OSError: it cannot be read.
        """
        ...


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """The images of a source, centre-cropped (spec B.12), with their labels.

    An image that cannot be decoded is skipped: the next readable one stands in for it (after
    the last image, the first). Which one follows from the files alone, so that a resumed run,
    and one with other workers or processes, sees the same. `damage` records them.

    Pixels are taken as stored, without the rotation that a camera may have noted (as published).
    JPEG files are decoded in full: the decoder could halve them on the way for less work, but the
    published crop halves with another filter.

    Args:
        source: the images.
        height, width: of the images handed out, in pixels.
        random_flip: the mirror image of each picture becomes a sample of its own, numbered
            `images + i`, and `len` doubles. In a shuffled order either orientation has
            probability one half, and the seed of the order alone decides which one is drawn,
            whatever the number of workers. The published runs do without.
        max_damaged_share: of the images, 0 to 1; above it reading fails.

    Raises:
        UserError: if too much of the source is lost already.
        ValueError: for a height or width under 1.
    """

    def __init__(
        self,
        source: ImageSource,
        height: int,
        width: int,
        random_flip: bool = False,
        max_damaged_share: float = 0.01,
    ) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"image size is {height}x{width}: both sides must be at least 1")
        self.source = source
        self.height = height
        self.width = width
        self.random_flip = random_flip
        self.damage = DamageRecord(source.names, max_damaged_share, source.lost, source.lost_images)

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return self.source.num_classes

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images' names and labels in their order, which a resumed run relies on."""
        return fingerprint(self.source.names, self.source.labels)

    def __len__(self) -> int:
        return len(self.source.names) * (2 if self.random_flip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample `index`: (3, height, width) uint8, and its label.

        Raises:
            IndexError: if `index` is outside 0 to `len - 1`.
            UserError: if a hundred images in a row cannot be read, none at all can, or more
                than `max_damaged_share` are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        mirrored, image_index = divmod(index, len(self.source.names))
        image, image_index = self._first_readable(image_index)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_pixels(image), int(self.source.labels[image_index])

    def _first_readable(self, image_index: int) -> tuple[Image.Image, int]:
        count = len(self.source.names)
        attempts = min(count, _DAMAGED_IN_A_ROW)
        for attempt in range(attempts):
            candidate = (image_index + attempt) % count
            try:
                return self._image(candidate), candidate
            except Exception as error:  # a damaged file can make Pillow raise almost anything
                self.damage.note(candidate, error)
        raise UserError(
            f"{attempts} image(s) in a row cannot be read, the first is "
            f"{self.source.names[image_index]}: check that the disk of {self.source.description} "
            "is there and that its files are images"
        )

    def _image(self, image_index: int) -> Image.Image:
        with Image.open(io.BytesIO(self.source.read(image_index))) as image:
            return centre_crop(to_rgb(image), self.height, self.width)
