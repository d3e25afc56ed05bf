"""Crops of scikit-learn's two sample photographs: natural images that need no download."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

NAMES = ("china", "flower")
"""A temple under trees and a dahlia, 640×427 pixels each."""

_STRIDE = 4


class PhotographCrops(Dataset[tuple[Tensor, int]]):
    """Every crop of a size at every fourth row and column: 30,294 of 32×32 pixels.

    The label is the photograph. Neighbouring crops overlap, so that there are far fewer different
    images than crops, and two photographs are all that a model learns of the world: enough to tell
    models apart that render texture and edges well from those that do not.

    Args:
        height, width: of a crop in pixels, at most 427 and 640.

    Attributes:
        classes: the names of the two photographs.
        damage: None; nothing that could be damaged is read.

    Raises:
        ValueError: for another height or width.
    """

    classes = NAMES
    num_classes = len(NAMES)
    damage = None

    def __init__(self, height: int = 32, width: int = 32) -> None:
        # Not at the top: scikit-learn takes seconds to import, and few commands draw on it.
        from sklearn.datasets import load_sample_image

        self.height, self.width = height, width
        self._photographs = torch.stack(
            [torch.from_numpy(np.array(load_sample_image(f"{name}.jpg"))) for name in NAMES]
        ).permute(0, 3, 1, 2)
        rows, columns = self._photographs.shape[2:]
        if not (1 <= height <= rows and 1 <= width <= columns):
            raise ValueError(f"crops are {height}×{width}: choose up to {rows}×{columns}")
        self._tops = range(0, rows - height + 1, _STRIDE)
        self._lefts = range(0, columns - width + 1, _STRIDE)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the photographs and of the crops' size."""
        digest = hashlib.sha256(f"{self.height} {self.width} {_STRIDE}".encode())
        digest.update(self._photographs.contiguous().numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(NAMES) * len(self._tops) * len(self._lefts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Crop `index`, (3, height, width) uint8, and its label.

        Raises:
            IndexError: if `index` is outside 0 to `len - 1`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"crop {index} of {len(self)}")
        rest, column = divmod(index, len(self._lefts))
        label, row = divmod(rest, len(self._tops))
        top, left = self._tops[row], self._lefts[column]
        crop = self._photographs[label, :, top : top + self.height, left : left + self.width]
        return crop.contiguous(), label
