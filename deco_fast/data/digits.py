"""scikit-learn's handwritten digits as RGB images: real data that needs no download."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

DigitsSplit = Literal["train", "test"]

# The split is part of the task: figures of two runs compare only if both left out these images.
HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 0

_DARKEST_INK = 16  # load_digits counts the inked pixels of each 4x4 block: 0 to 16


class DigitsDataset(Dataset[tuple[Tensor, int]]):
    """The 1,797 digits of `sklearn.datasets.load_digits`, enlarged and held in memory.

    The 8x8 images are enlarged to `size` x `size` by `F.interpolate(mode="bilinear",
    align_corners=False)`, repeated over three channels and scaled to [-1, 1] (ink is 1).

    A fixed split, stratified by class, sets 20% aside: `"train"` has 1,437 images, `"test"`
    360. Nothing is ever trained on the second; the evaluation compares with it.

    Args:
        split: `"train"` or `"test"`.
        size: height and width in pixels, at least 8.

    Attributes:
        images: (N, 3, size, size) float32 in [-1, 1].
        labels: (N,) int64, 0 to 9.
        classes: the names of the ten classes.
        damage: None; nothing is read from a disk.

    Raises:
        ValueError: for another split or a size under 8.
    """

    classes = tuple(str(digit) for digit in range(10))
    num_classes = len(classes)
    damage = None

    def __init__(self, split: DigitsSplit = "train", size: int = 32) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}: choose 'train' or 'test'")
        if size < 8:
            raise ValueError(f"size is {size}: the digits have 8x8 pixels, choose 8 or more")
        # Not at the top: scikit-learn takes seconds to import, and few commands draw on it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        train, test = train_test_split(
            range(len(labels)),
            test_size=HELD_OUT_FRACTION,
            random_state=SPLIT_SEED,
            stratify=labels,
        )
        chosen = torch.tensor(train if split == "train" else test)
        small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[chosen]
        large = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
        self.images = (large * (2 / _DARKEST_INK) - 1).repeat(1, 3, 1, 1)
        self.labels = torch.from_numpy(labels).long()[chosen]

    @property
    def fingerprint(self) -> str:
        """A hash of which images these are, in their order."""
        return hashlib.sha256(self.labels.numpy().data).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image `index`, (3, size, size) float32 in [-1, 1], and its label."""
        return self.images[index], int(self.labels[index])
