"""From a file's image to the tensor that the model is trained on (spec B.12)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Crop = Literal["adm", "bilinear"]
"""How an image is brought to size: as published for classes and pretraining, for fine-tuning."""

_MOST_PIXELS = 2**27
"""Of an image on its way to size: 400 MB."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
"""What files are opened as: Pillow knows more, and asks Ghostscript to run PostScript."""


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB; alpha is dropped, as in the published pipeline.

    Raises:
        ValueError: for floating-point and 32-bit pixels, whose range the file does not tell.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode == "I" and image.format == "TIFF":  # in other formats these are 16 bits
        raise ValueError("its pixels are 32-bit integers of unknown range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255, which turns almost every such image white.
        grey = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about every such file
    return image.convert("RGB")


def _check_size(image: Image.Image, covering: tuple[int, int]) -> None:
    """Refuse what takes gigabytes: 1×60,000 pixels cover a square of 256 with 15 million rows."""
    if covering[0] * covering[1] > _MOST_PIXELS:
        raise ValueError(
            f"{image.width}×{image.height} is too long and narrow: covering the size asked for "
            f"takes {covering[0]}×{covering[1]} pixels"
        )


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The ADM centre crop: the largest centred part of the right shape, scaled to size.

    The image is halved with a box filter while both sides stay at least twice as long as
    wanted, then scaled bicubically until it just covers `height` x `width` pixels, then cut,
    the remainder of an odd margin falling to the right and bottom. For a square this is the
    published crop; the same rule serves other shapes.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = (round(image.width * scale), round(image.height * scale))
    _check_size(image, covering)
    image = image.resize(covering, resample=Image.Resampling.BICUBIC)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def shorter_side_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of the image scaled bilinearly, with antialiasing, until it just covers the size.

    For squares what torchvision's Resize and CenterCrop give, with which the published
    fine-tuning reads its images: the longer side is rounded down, an odd margin to even.
    """
    scale = max(width / image.width, height / image.height)
    covering = (
        max(width, int(image.width * scale + 1e-6)),
        max(height, int(image.height * scale + 1e-6)),
    )
    _check_size(image, covering)
    image = image.resize(covering, resample=Image.Resampling.BILINEAR)
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def crop_to_size(image: Image.Image, height: int, width: int, crop: Crop) -> Image.Image:
    """An image of that size, by `centre_crop` ("adm") or `shorter_side_crop` ("bilinear")."""
    return (centre_crop if crop == "adm" else shorter_side_crop)(image, height, width)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], the same bits on every device.

    Batches travel as bytes, a quarter of what float32 takes through shared memory, pinned memory
    and the bus, and become floats where the model is.
    """
    # A tensor and no Python number: CUDA multiplies by a number's reciprocal, which rounds
    # otherwise than the division on the CPU. Filled there: a copy from the CPU would wait for all
    # that the GPU still has to do.
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.float() / half - 1
