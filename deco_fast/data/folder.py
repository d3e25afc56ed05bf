"""Images in class folders, laid out as ImageNet is: `root/<class>/<image>`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from deco_fast.data.transforms import centre_crop, to_rgb, to_tensor
from deco_fast.errors import UserError

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

# The first unreadable images are named one by one, the rest are counted.
_NAMED_UNREADABLE = 10
# So many in a row are no stray damage but a lost disk or a wrong folder.
_UNREADABLE_IN_A_ROW = 100


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Every image below `root/<class>/`, centre-cropped, with the number of its class.

    Classes are numbered in the order of their folders' names, as for the published checkpoints;
    images are ordered by path. Names that begin with a dot are ignored. Listing a tree opens no
    image; a progress bar appears if it takes longer than two seconds.

    An image that cannot be decoded is skipped: the next readable one stands in for it (after
    the last image, the first). Which one follows from the files alone, so that a resumed run
    sees the same. The first ten are logged by name, and `unreadable()` lists all that this
    process and its loader workers met so far.

    Pixels are taken as stored, without the rotation that a camera may have noted (as published).

    Args:
        root: the folder with the class folders.
        height, width: of the images handed out, in pixels.
        random_flip: the mirror image of each picture becomes a sample of its own, numbered
            `len(images) + i`, and `len` doubles. In a shuffled order either orientation has
            probability one half, and the seed of the order alone decides which one is drawn,
            whatever the number of workers. The published runs do without.

    Attributes:
        classes: the names of the class folders; the label of `classes[k]` is k.

    Raises:
        UserError: if `root` is missing or unreadable, has no class folders, or a class folder
            has no images.
        ValueError: for a height or width under 1.
    """

    def __init__(
        self, root: str | os.PathLike[str], height: int, width: int, random_flip: bool = False
    ) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"image size is {height}x{width}: both sides must be at least 1")
        self.root = Path(root)
        self.height = height
        self.width = width
        self.random_flip = random_flip
        self.classes = _class_names(self.root)

        paths: list[bytes] = []
        counts = []
        bar = tqdm(self.classes, desc=f"listing {self.root}", unit="class", delay=2, leave=False)
        for name in bar:
            of_class = sorted(_image_paths(self.root, name))
            if not of_class:
                raise UserError(
                    f"class folder {self.root / name} has no images: remove it, or put images "
                    f"({', '.join(IMAGE_SUFFIXES)}) into it"
                )
            paths += of_class
            counts.append(len(of_class))
        # One long string and its offsets: a million Python strings would be copied into every
        # forked worker page by page, as their reference counts change.
        self._path_bytes = b"".join(paths)
        self._path_ends = np.cumsum([len(path) for path in paths])
        self._labels = np.repeat(np.arange(len(counts)), counts)
        # Shared with the worker processes, which are the ones that open files.
        self._unreadable = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._labels) * (2 if self.random_flip else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample `index`: (3, height, width) float32 in [-1, 1], and its label.

        Raises:
            IndexError: if `index` is outside 0 to `len - 1`.
            UserError: if a hundred images in a row cannot be read, or none at all can.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        mirrored, image_index = divmod(index, len(self._labels))
        image, image_index = self._first_readable(image_index)
        image = centre_crop(image, self.height, self.width)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image), int(self._labels[image_index])

    def path(self, image_index: int) -> Path:
        """The file of image `image_index`, 0 to the number of images - 1."""
        start = int(self._path_ends[image_index - 1]) if image_index else 0
        name = self._path_bytes[start : int(self._path_ends[image_index])]
        return self.root / os.fsdecode(name)

    def unreadable(self) -> list[Path]:
        """The images met so far that could not be decoded."""
        return [self.path(int(index)) for index in self._unreadable.nonzero()]

    def _first_readable(self, image_index: int) -> tuple[Image.Image, int]:
        attempts = min(len(self._labels), _UNREADABLE_IN_A_ROW)
        for attempt in range(attempts):
            candidate = (image_index + attempt) % len(self._labels)
            try:
                return _decode(self.path(candidate)), candidate
            except Exception as error:  # a damaged file can make Pillow raise almost anything
                self._report(candidate, error)
        raise UserError(
            f"{attempts} image(s) in a row cannot be read, the first is {self.path(image_index)}: "
            f"check that the disk of {self.root} is there and that its files are images"
        )

    def _report(self, image_index: int, error: Exception) -> None:
        if self._unreadable[image_index]:
            return
        self._unreadable[image_index] = True
        count = int(self._unreadable.sum())
        if count <= _NAMED_UNREADABLE:
            _log.warning("skipped unreadable image %s: %s", self.path(image_index), error)
        if count == _NAMED_UNREADABLE:
            _log.warning("further unreadable images will only be counted")


def _class_names(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    except FileNotFoundError:
        raise UserError(f"image folder {root} does not exist: check the path") from None
    except NotADirectoryError:
        raise UserError(f"{root} is no folder: give the folder with the class folders") from None
    except OSError as error:
        raise UserError(f"image folder {root} cannot be read: {error.strerror}") from None
    if not names:
        raise UserError(
            f"image folder {root} has no class folders: put the images of each class into a "
            f"folder of its own, {root / 'CLASS' / 'IMAGE.jpg'}"
        )
    return sorted(names)


def _image_paths(root: Path, class_name: str) -> Iterator[bytes]:
    """Paths relative to `root`, as bytes, in no particular order."""

    def refuse(error: OSError) -> None:
        raise UserError(f"image folder {error.filename} cannot be read: {error.strerror}")

    for folder, subfolders, files in os.walk(root / class_name, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        relative = os.path.relpath(folder, root)
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".":
                yield os.fsencode(os.path.join(relative, name))


def _decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return to_rgb(image)
