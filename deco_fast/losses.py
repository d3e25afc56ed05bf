"""The training loss, and the JPEG tables that weigh its frequencies (specification B.7)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from deco_fast.errors import nearest
from deco_fast.ops import flow_matching_loss as flow_matching_loss

FrequencyMode = Literal["inv", "inv_gamma"]

# The quantisation tables of JPEG, ITU-T T.81, Annex K, tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


_LARGEST_GAMMA = 100  # with much larger ones the weights are not finite


def quantization_table(quality: int = 85) -> Tensor:
    """JPEG's quantisation steps for Y, Cb and Cr at libjpeg's quality 1 … 100, (3, 8, 8) int64.

    A quality outside that range is clamped to it, as libjpeg does.
    """
    quality = min(max(quality, 1), 100)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE])
    return ((base * scale + 50) // 100).clamp(1, 255)


def frequency_table(
    quality: int = 85, mode: FrequencyMode = "inv_gamma", gamma: float = 1.0
) -> Tensor:
    """Weights of the DCT frequencies of Y, Cb and Cr, (3, 8, 8) float32, each of mean 1.

    Args:
        quality: of the JPEG tables Q, 1 … 100; a coarse step is a frequency people miss least.
        mode: "inv" weighs by 1/Q, "inv_gamma" by (mean(Q)/Q)^gamma.
        gamma: exponent of "inv_gamma"; 1 gives the table of "inv", 0 gives ones.

    Raises:
        ValueError: the mode has no such name, or gamma is out of range.
    """
    if not abs(gamma) <= _LARGEST_GAMMA:
        raise ValueError(f"gamma must be {-_LARGEST_GAMMA} … {_LARGEST_GAMMA}, not {gamma}")
    steps = quantization_table(quality).double()
    if mode == "inv":
        weights = 1 / steps
    elif mode == "inv_gamma":
        weights = (steps.mean(dim=(1, 2), keepdim=True) / steps) ** gamma
    else:
        raise ValueError(f"unknown frequency mode '{mode}'{nearest(mode, get_args(FrequencyMode))}")
    return (weights / weights.mean(dim=(1, 2), keepdim=True)).float()
