"""The products of linear upsampling on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times the transpose of b (N, K), contiguous (M, N)."""
    return F.linear(a, b)
