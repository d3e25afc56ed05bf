"""Classifier-free guidance: where it acts, and how the two velocities combine."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def check_interval(interval: tuple[float, float]) -> None:
    """Raise ValueError unless 0 ≤ low ≤ high ≤ 1."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"guidance interval ({low}, {high}) must satisfy 0 ≤ low ≤ high ≤ 1; "
            "times run from 0 (noise) to 1 (data)"
        )


def guidance_active(t: float, interval: tuple[float, float], closed_end: bool) -> bool:
    """Whether guidance acts at time t: t in (low, high], or in (low, high) without closed_end.

    The comparison is made in float32, as published: an edge that equals a time of the grid
    would otherwise fall on the other side (specification D6). The start is always open, so the
    very first step, at t = 0, is never guided.
    """
    time, low, high = np.float32(t), np.float32(interval[0]), np.float32(interval[1])
    return bool(low < time and (time <= high if closed_end else time < high))


def guide(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """u + scale·(c − u) for velocities (B, …), with optional rescaling.

    Args:
        unconditional, conditional: velocities u and c.
        scale: guidance scale; 1 is c, above 1 extrapolates.
        rescale: 0 … 1, how far each sample's standard deviation is drawn back to that of c
            (Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed",
            equations 14–16); 0 is off.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (1 + rescale * (ratio - 1))
