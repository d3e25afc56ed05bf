"""Images and labels from any source, decoded and cropped, damaged ones replaced."""

from __future__ import annotations

import io
from abc import abstractmethod
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deco_fast.data.damage import DamageRecord
from deco_fast.data.names import Names, fingerprint
from deco_fast.data.transforms import IMAGE_FORMATS, Crop, crop_to_size, to_pixels, to_rgb
from deco_fast.errors import UserError

# So many in a row are no stray damage but a lost disk or a wrong folder.
_UNUSABLE_IN_A_ROW = 100

# Where one in ten is large enough, one of these is in 97 of 100 cases.
_DRAWN_INSTEAD = 32


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


class Shortfall(Exception):
    """An image is whole but not what is wanted: it is passed over, and no damage."""


class EncodedImages(Protocol):
    """What `ImageSource` and `CaptionSource` have in common."""

    description: str
    names: Names
    lost: tuple[str, ...]
    lost_images: int

    def read(self, index: int) -> bytes:
        """The encoded image `index`."""
        ...


class DecodedImages(Dataset[tuple[Tensor, Any]]):
    """The images of a source, decoded and cropped, each with its condition.

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
        crop: how an image is brought to size.

    Raises:
        UserError: if too much of the source is lost already.
        ValueError: for a height or width under 1.
    """

    def __init__(
        self,
        source: EncodedImages,
        height: int,
        width: int,
        random_flip: bool,
        max_damaged_share: float,
        crop: Crop,
    ) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"image size is {height}x{width}: both sides must be at least 1")
        self.source = source
        self.height = height
        self.width = width
        self.random_flip = random_flip
        self.crop: Crop = crop
        self.damage = DamageRecord(source.names, max_damaged_share, source.lost, source.lost_images)

    @abstractmethod
    def _condition(self, image_index: int) -> Any:
        """The label or caption of an image; any error makes it a damaged one."""

    def _check(self, image: Image.Image) -> None:
        """Raise `Shortfall` for an image, not yet decoded, that shall be passed over."""

    def __len__(self) -> int:
        return len(self.source.names) * (2 if self.random_flip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Sample `index`: (3, height, width) uint8, and its label or caption.

        Raises:
            IndexError: if `index` is outside 0 to `len - 1`.
            UserError: if a hundred images in a row cannot be read, none at all can, or more
                than `max_damaged_share` are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        mirrored, image_index = divmod(index, len(self.source.names))
        image, condition = self._first_usable(image_index)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_pixels(image), condition

    def _first_usable(self, image_index: int) -> tuple[Image.Image, Any]:
        count = len(self.source.names)
        attempts = min(count, _UNUSABLE_IN_A_ROW)
        reason = "cannot be read"
        for attempt in range(attempts):
            found = self._usable((image_index + attempt) % count)
            if isinstance(found, tuple):
                return found
            if isinstance(found, Shortfall):
                reason = f"cannot be used ({found})"
            if isinstance(found, Shortfall) and attempt == 0:
                # Of images that are passed over there may be many, and in a row: if the next one
                # stood in for all of them, it would be drawn as often.
                for other in self._drawn_instead(image_index):
                    if isinstance(stand_in := self._usable(other), tuple):
                        return stand_in
        raise UserError(
            f"{attempts} image(s) in a row {reason}, the first is "
            f"{self.source.names[image_index]}: check that the disk of {self.source.description} "
            "is there and that its files are images of the size asked for"
        )

    def _usable(self, image_index: int) -> tuple[Image.Image, Any] | Exception:
        """The image and its condition, or why it cannot be used; damage is noted."""
        try:
            return self._image(image_index), self._condition(image_index)
        except Shortfall as shortfall:
            return shortfall
        except Exception as error:  # a damaged file can make Pillow raise almost anything
            self.damage.note(image_index, error)
            return error

    def _drawn_instead(self, image_index: int) -> list[int]:
        """A few images, any as likely as another, the same whenever it is asked."""
        drawn = np.random.SeedSequence(image_index).generate_state(_DRAWN_INSTEAD, np.uint64)
        drawn %= len(self.source.names)
        return [int(number) for number in drawn]

    def _image(self, image_index: int) -> Image.Image:
        with Image.open(io.BytesIO(self.source.read(image_index)), formats=IMAGE_FORMATS) as image:
            self._check(image)
            return crop_to_size(to_rgb(image), self.height, self.width, self.crop)


class ImageDataset(DecodedImages):
    """Images, centre-cropped (spec B.12), with their labels; see `DecodedImages`."""

    source: ImageSource

    def __init__(
        self,
        source: ImageSource,
        height: int,
        width: int,
        random_flip: bool = False,
        max_damaged_share: float = 0.01,
    ) -> None:
        super().__init__(source, height, width, random_flip, max_damaged_share, "adm")

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return self.source.num_classes

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images' names and labels in their order, which a resumed run relies on."""
        return fingerprint(self.source.names, self.source.labels)

    def _condition(self, image_index: int) -> int:
        return int(self.source.labels[image_index])
