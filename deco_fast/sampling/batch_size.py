"""How many images at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Pixels in a batch: 64 images of 32×32 or one of 256×256 on a CPU, whose caches larger batches
# leave; 32 images of 256×256 on a GPU, enough to keep its units busy.
_PIXELS_ON_CPU = 64 * 32**2
_PIXELS_ELSEWHERE = 32 * 256**2
# Beyond 256 images of 256×256 a GPU gains nothing any more.
_MOST_PIXELS = 256 * 256**2


def default_batch_size(device: torch.device, height: int, width: int) -> int:
    """Images per batch of a size in pixels that suits a device."""
    pixels = _PIXELS_ON_CPU if device.type == "cpu" else _PIXELS_ELSEWHERE
    return max(1, pixels // (height * width))


def largest_batch_size(run: Callable[[int], object], height: int, width: int, limit: int) -> int:
    """The largest batch that fits into a GPU's memory, of a power of two.

    Args:
        run: computes one batch of a size, and runs out of memory or does not.
        height, width: of an image in pixels.
        limit: images that there are to draw; no larger batch is looked for.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    size = min(_MOST_PIXELS // (height * width), 2 ** (limit - 1).bit_length())
    while size > 1:
        try:
            run(size)
        except torch.OutOfMemoryError:
            size //= 2
            torch.cuda.empty_cache()
        else:
            return min(size, limit)
    run(1)
    return 1
