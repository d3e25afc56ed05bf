"""The noise that an image begins from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_KEYS = 2**64


def noise_for(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of image `index`: a function of (seed, index) alone.

    Drawn from Philox 4×64, a counter-based generator that hashes its position under a key, here
    the pair (seed, index): no two pairs share a key. (torch's generator on the CPU keeps 32 bits
    of its seed; of 50,000 images two would begin alike with a probability of 1 in 4.)

    Args:
        seed: of the whole run, 0 … 2⁶⁴ − 1.
        index: of the image in the run, 0 … 2⁶⁴ − 1.
        shape: (C, H, W).

    Returns:
        float32 on the CPU.

    Raises:
        ValueError: seed or index out of range.
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < _KEYS:
            raise ValueError(f"{name} must be 0 … 2⁶⁴ − 1, not {value}")
    # As an array: NumPy takes a list of integers this large for floating-point numbers.
    philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    normal = np.random.Generator(philox).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(normal)
