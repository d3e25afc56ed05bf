"""The training loss: flow matching plus the frequency-aware term (specification B.7).

    d     = prediction − target
    fm    = mean( w_t · d² )
    freq  = mean( table[c, u, v] · DCT₈ₓ₈(YCbCr(d))² )
    total = fm + weight · freq

Colour conversion, padding and transform are linear, so one transform of the difference
replaces two of prediction and target, and small differences lose nothing (specification D1).
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from deco_fast.kernels.autocast import without_autocast

BLOCK = 8

# Full-range JPEG (JFIF) conversion, rows Y, Cb, Cr, without the +128 offset of the chroma.
RGB_TO_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def dct_matrix(
    device: torch.device | None = None, dtype: torch.dtype = torch.float32, size: int = BLOCK
) -> Tensor:
    """The orthonormal DCT-II matrix A, (size, size); the transform of a block X is A X Aᵀ."""
    k = torch.arange(size, device=device, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi / size * (k + 0.5) * k[:, None])
    matrix[0] /= math.sqrt(2)
    return matrix.to(dtype)


def reflect_to_blocks(x: Tensor) -> Tensor:
    """Pad (…, H, W) on the right and at the bottom to multiples of 8 by reflection.

    Where a side is shorter than its padding the reflection goes back and forth, as in
    `numpy.pad(mode="reflect")`.
    """
    for dim in (-2, -1):
        size = x.shape[dim]
        padded = -(-size // BLOCK) * BLOCK
        if padded != size:
            period = max(2 * (size - 1), 1)
            place = torch.arange(padded, device=x.device) % period
            x = x.index_select(dim, torch.minimum(place, period - place).clamp(max=size - 1))
    return x


def ycbcr_block_dct(image: Tensor) -> Tensor:
    """RGB (B, 3, H, W) to its YCbCr 8×8 DCT coefficients (B, 3, ⌈H/8⌉, ⌈W/8⌉, 8, 8)."""
    # Filled in where the image lies: copied from the host they would make it wait for a GPU.
    entries = [image.new_full((), entry) for row in RGB_TO_YCBCR for entry in row]
    matrix = torch.stack(entries).view(3, 3)
    ycbcr = torch.einsum("dc,bchw->bdhw", matrix, image)
    blocks = rearrange(reflect_to_blocks(ycbcr), "b c (h u) (w v) -> b c h w u v", u=BLOCK, v=BLOCK)
    dct = dct_matrix(image.device, image.dtype)
    return dct @ blocks @ dct.T


def flow_matching_loss(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float | Tensor,
    timestep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `deco_fast.ops.flow_matching_loss`; float32 inside whatever the inputs, also under
    autocast, which would otherwise run the transform in bf16 (specification D1)."""
    with without_autocast(prediction.device.type):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        difference = prediction.to(dtype) - target.to(dtype)
        squared = difference.square()
        if timestep_weight is not None:
            squared = timestep_weight.to(dtype).view(-1, 1, 1, 1) * squared
        flow_matching = squared.mean()
        coefficients = ycbcr_block_dct(difference)
        frequency = (table.to(dtype)[:, None, None] * coefficients.square()).mean()
        total = flow_matching + weight * frequency
    return total, flow_matching.detach(), frequency.detach()
