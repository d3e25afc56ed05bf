"""The images whose spectra are measured: the built-in digits or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from deco_fast.data.digits import DigitsDataset
from deco_fast.data.folder import FolderImages
from deco_fast.data.loader import LabelledImages
from deco_fast.data.transforms import normalise
from deco_fast.errors import UserError
from deco_fast.evaluation.image_sets import FolderOfImages
from deco_fast.evaluation.spectrum import LabelledBatch

DIGITS = "digits"
"""The held-out ones."""


class SpectrumImages:
    """Images of one size with labels, or with the null class where they have none.

    Args:
        images: with labels, or a folder's.
        null: the null class.
        labelled: whether the labels are the model's classes.
        labels: (images,) int64, of a folder's images.

    Attributes:
        labelling: which labels they have, for people.
    """

    def __init__(
        self,
        images: LabelledImages | FolderOfImages,
        null: int,
        labelled: bool,
        labels: Tensor | None = None,
    ) -> None:
        self._images, self._null, self._labelled = images, null, labelled
        self._labels = torch.full((len(images),), null) if labels is None else labels
        self.labelling = "with their labels" if labelled else "with the null class"

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, count: int, batch_size: int) -> Iterator[LabelledBatch]:
        """`count` images, evenly spread over all of them: a folder's come class by class.

        Raises:
            UserError: one cannot be read.
        """
        numbers = [place * len(self) // count for place in range(count)]
        if isinstance(self._images, FolderOfImages):
            labels_of_batches = self._labels[numbers].split(batch_size)
            batches = self._images.batches(numbers, batch_size)
            for images, labels in zip(batches, labels_of_batches, strict=True):
                yield LabelledBatch(normalise(images), labels)
            return
        for first in range(0, count, batch_size):
            pairs = [self._images[number] for number in numbers[first : first + batch_size]]
            images = torch.stack([image for image, _ in pairs])
            known = [label if self._labelled else self._null for _, label in pairs]
            pixels = normalise(images) if images.dtype == torch.uint8 else images
            yield LabelledBatch(pixels, torch.tensor(known))


def open_labelled(name: str, height: int, width: int, num_classes: int) -> SpectrumImages:
    """The images for a model.

    Args:
        name: "digits", or a folder: class folders where there are as many as the model has
            classes, else any images below it, which get the null class.
        height, width: the model's, in pixels; a folder's images are cut as in training.
        num_classes: the model's.

    Raises:
        UserError: there are no such images.
    """
    if name == DIGITS:
        if height != width:
            raise UserError(f"--images digits are square, and the model draws {height}×{width}")
        digits = DigitsDataset("test", height)
        return SpectrumImages(digits, num_classes, digits.num_classes == num_classes)
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"--images {name} is no folder: name one, or {DIGITS}")
    if sum(entry.is_dir() and entry.name[0] != "." for entry in path.iterdir()) == num_classes:
        classes = FolderImages(path)
        files = [classes.path(number) for number in range(len(classes.names))]
        images = FolderOfImages(path, (height, width), files)
        return SpectrumImages(images, num_classes, labelled=True, labels=classes.labels)
    return SpectrumImages(FolderOfImages(path, (height, width)), num_classes, labelled=False)
