"""Normalised and rotated queries and keys by the fused op, for the backend `triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from deco_fast.kernels.capability import is_foreign
from deco_fast.kernels.qk_norm_rope import reference
from deco_fast.kernels.registration import fused_ops, within_transform

MAX_HEAD_SIZE = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `deco_fast.ops.qk_norm_rope`; what comes out lies in memory as (B, L, H, d).

    Left to the reference: float64, heads of more than 128 channels, a rotary table that wants a
    gradient, GPUs that are `is_foreign`, and all inside of `torch.func` transforms.
    """
    fits = qkv.dtype in _DTYPES and len(q_weight) <= MAX_HEAD_SIZE and not rotary.requires_grad
    if is_foreign(qkv) or within_transform() or not fits:
        return reference.qk_norm_rope(qkv, q_weight, k_weight, rotary, eps)
    q, k, v = fused_ops.qk_norm_rope(qkv, q_weight, k_weight, rotary, eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
