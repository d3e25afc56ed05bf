"""RMSNorm and modulation by the fused op, for the backend `triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from deco_fast.kernels.capability import is_foreign
from deco_fast.kernels.norm_modulate import reference
from deco_fast.kernels.registration import fused_ops, within_transform

MAX_WIDTH = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """See `deco_fast.ops.norm_modulate`.

    Left to the reference: float64, more than 4,096 channels, any other modulation than one for each
    image, GPUs that are `is_foreign`, all inside of `torch.func` transforms, and what torch.compile
    traces.
    """
    # Inductor fuses the reference with the residual before it, and orders it without the Python of
    # an opaque op, which costs the host more than the op's faster backward pass gains.
    if torch.compiler.is_compiling():
        return reference.norm_modulate(x, weight, shift, scale, eps)
    for_each_image = (*x.shape[:-2], 1, x.shape[-1])
    fits = x.dtype in _DTYPES and x.ndim == 3 and x.shape[-1] <= MAX_WIDTH
    fits &= shift.shape == for_each_image and scale.shape == for_each_image
    if is_foreign(x) or within_transform() or not fits:
        return reference.norm_modulate(x, weight, shift, scale, eps)
    result: Tensor = fused_ops.norm_modulate(x, weight, shift, scale, eps)
    return result
