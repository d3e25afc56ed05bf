"""From the model's floats to pixels, and many images as one picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deco_fast.checkpoint.atomic import atomic_file

GRID_COLUMNS = 10
_GAP = 2  # pixels between the images of a grid


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, C, H, W), about [−1, 1], as uint8 (B, H, W, C).

    clip((x + 1)·127.5 + 0.5, 0, 255), truncated: halves are rounded up, as published (B.12).
    """
    levels = ((images + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def image_grid(images: Tensor, columns: int = GRID_COLUMNS) -> Image.Image:
    """One picture of uint8 images (N, H, W, 3), N at least 1, row by row on white."""
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    cell_height, cell_width = height + _GAP, width + _GAP
    canvas = np.full(
        (rows * cell_height - _GAP, columns * cell_width - _GAP, channels), 255, np.uint8
    )
    for i, image in enumerate(images.numpy()):
        top, left = i // columns * cell_height, i % columns * cell_width
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def save_grid(images: Tensor, path: Path, columns: int = GRID_COLUMNS) -> None:
    """Write a grid of images as a PNG file, atomically; missing folders are made.

    Args:
        images: the model's (N, 3, H, W), or uint8 (N, H, W, 3).
        path: the PNG file.
        columns: images in a row.

    Raises:
        UserError: the file cannot be written.
    """
    if images.is_floating_point():
        images = to_uint8(images).cpu()
    with atomic_file(path) as temporary:
        image_grid(images, columns).save(temporary, format="png")
