"""AdaLN of the DiT: RMSNorm, then the modulation by time and class (specification B.3).

x / √(mean(x²) + eps) · weight · (1 + scale) + shift
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis, float32 inside, x's dtype outside."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
    return y.to(x.dtype)


def norm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (B, L, D), shift and scale (B, 1, D) or (B, L, D), to (B, L, D)."""
    return rms_norm(x, weight, eps) * (1 + scale) + shift
