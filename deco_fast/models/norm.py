"""RMSNorm with float32 statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deco_fast.kernels.norm_modulate.reference import rms_norm


class RMSNorm(nn.Module):
    """x / √(mean(x²) + 1e-6) · weight over the last axis, float32 inside, x's dtype outside.

    Not `nn.RMSNorm`: under autocast that takes a composite path for bf16 inputs with a
    float32 weight.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
