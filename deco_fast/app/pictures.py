"""Pictures of a run on its way: all images as one grid that fits the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deco_fast.sampling.images import image_grid, to_uint8

FRAMES = 24
"""Moments of a run that are shown, after its noise."""

# The longer side of a grid in pixels, about.
_SIDE = 512
_MILLISECONDS = 80
_MILLISECONDS_AT_THE_END = 2000


def is_frame(evaluation: int, evaluations: int) -> bool:
    """Whether the state after so many evaluations is shown: the first, the last, evenly between."""
    before, now = ((done * FRAMES) // evaluations for done in (evaluation - 1, evaluation))
    return evaluation == 0 or now > before


class GridPicture:
    """Images of one size as a grid, each there when it is set, white until then.

    Args:
        count: images.
        height, width: of each, in pixels.
    """

    def __init__(self, count: int, height: int, width: int) -> None:
        self._columns = math.ceil(math.sqrt(count))
        self._reduction = min(1.0, _SIDE / (max(height, width) * self._columns))
        self._size = max(1, int(height * self._reduction)), max(1, int(width * self._reduction))
        self._cells = torch.full((count, *self._size, 3), 255, dtype=torch.uint8)

    def set(self, indices: Sequence[int], images: Tensor) -> None:
        """Show these images (B, 3, H, W), about [−1, 1], in their places."""
        if self._reduction < 1:
            images = F.interpolate(images.clamp(-1, 1), self._size, mode="area")
        self._cells[list(indices)] = to_uint8(images).cpu()

    def picture(self) -> Image.Image:
        """The grid as it is now; small images are enlarged by a whole factor."""
        grid = image_grid(self._cells, self._columns)
        factor = max(1, _SIDE // max(grid.size))
        return grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.NEAREST)


def save_animation(pictures: Sequence[Image.Image], path: Path) -> None:
    """Write pictures as an animated WebP file that repeats and rests on the last one."""
    durations = [_MILLISECONDS] * (len(pictures) - 1) + [_MILLISECONDS_AT_THE_END]
    pictures[0].save(
        path,
        save_all=True,
        append_images=list(pictures[1:]),
        duration=durations,
        loop=0,
        quality=85,
        method=0,  # the fastest: noise does not compress anyway
    )
