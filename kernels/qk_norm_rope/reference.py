"""What comes before attention: queries and keys of every head normalised, then rotated.

    q ← rotate(q / √(mean(q²) + eps) · q_weight),   k alike,   v as it is

Specification B.3 (QK-norm: before the rotation, its weight shared by the heads) and B.4.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from deco_fast.kernels.norm_modulate.reference import rms_norm


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x (B, heads, L, head_dim) by the table; float32 inside."""
    cos, sin = table.unbind(-1)
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, L, 3·H·d) to q, k, v, each (B, H, L, d)."""
    heads = qkv.shape[-1] // (3 * len(q_weight))
    q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=heads)
    q = apply_rotary(rms_norm(q, q_weight, eps), rotary)
    k = apply_rotary(rms_norm(k, k_weight, eps), rotary)
    return q, k, v
