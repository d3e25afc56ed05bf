"""Linear upsampling: one DiT token becomes a condition vector for each of its p² pixels.

    y[b·L + l, i, c] = Σ_d tokens[b, l, d] · weight[i·C + c, d] + bias[i·C + c]

Specification B.5 (`cond_embed`): pixel-major, channel-fast.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def linear_upsample(tokens: Tensor, weight: Tensor, bias: Tensor, patch_size: int) -> Tensor:
    """Upsample tokens (B, L, D) to per-pixel conditions (B·L, p², C), before SiLU.

    Args:
        tokens: (B, L, D), the DiT's output.
        weight: (p²·C, D).
        bias: (p²·C,).
        patch_size: p, the side of a patch in pixels.
    """
    y = F.linear(tokens, weight, bias)
    return rearrange(y, "b l (i c) -> (b l) i c", i=patch_size**2)
