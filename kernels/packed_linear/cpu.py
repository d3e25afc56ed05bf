"""Linear layers on a CPU with weights packed once: oneDNN's block products, our ends of them.

The library's `F.linear` reorders a bfloat16 weight at every call and, for float32, is MKL's, slow
on AMD's processors with AVX-512. A packed weight is read as it lies, and bias, SwiGLU and rounding
happen to a tile of sums before it leaves the cache (csrc/packed_linear_op.cpp).

float32 products can be made of three in bfloat16, on a matrix unit at twice the rate of float32:
w = w_high + w_low in 16 bits of mantissa, x likewise, the product of the two low parts left out.
The relative error is 4e-6 where float32 itself has 4e-7.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_fast.kernels.registration import fused_ops
from deco_fast.kernels.registry import extension_problem

_BLOCK = 64  # rows of the weight that lie together
_HALF = _BLOCK // 2


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine computes with packed weights for inputs of this dtype."""
    if extension_problem() is not None or dtype not in (torch.float32, torch.bfloat16):
        return False
    from deco_fast import _C

    if not _C.has_block_products():
        return False
    probe = torch.zeros(_BLOCK, 2, dtype=dtype)
    try:
        _C.packed_linear(probe[:1], _C.pack_weight(probe, False), None, _BLOCK, False)
    except RuntimeError:  # oneDNN has no such product for this processor
        return False
    return True


@functools.cache
def can_split() -> bool:
    """Whether three products in bfloat16 are faster here than one in float32."""
    if not (can_pack(torch.float32) and can_pack(torch.bfloat16)):
        return False
    from deco_fast import _C

    return _C.has_matrix_unit()


def pack(weight: Tensor, *, three_products: bool = False) -> Tensor:
    """A weight (N, K), K even, as `packed_linear` reads it.

    Args:
        weight: float32 or bfloat16.
        three_products: of a float32 weight the high and the low part in bfloat16.
    """
    from deco_fast import _C

    return _C.pack_weight(weight.contiguous(), three_products)


def interleave(gate: Tensor, value: Tensor) -> Tensor:
    """The two weights of SwiGLU (N, K) as one (2N', K) that is to be packed.

    N' is N rounded up to a multiple of 32; the results beyond N are zero.
    """
    rest = -len(gate) % _HALF
    parts = [F.pad(weight, (0, 0, 0, rest)).unflatten(0, (-1, _HALF)) for weight in (gate, value)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, *, swiglu: bool = False
) -> Tensor:
    """x Wᵀ + b for a packed W, or SwiGLU for the packed result of `interleave`.

    Args:
        x: (…, K) in the dtype that was packed for.
        weight: by `pack`.
        bias: (N), float32.
        out_features: N, of `interleave`'s result 2N'.

    Returns:
        (…, N), or (…, N') for SwiGLU, contiguous, in the dtype of x.
    """
    return fused_ops.packed_linear(x, weight, bias, out_features, swiglu)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, swiglu: bool
) -> Tensor:
    """See `deco_fast.kernels.registration`."""
    from deco_fast import _C

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    result = _C.packed_linear(rows, weight, bias, out_features, swiglu)
    return result.view(*x.shape[:-1], result.shape[-1])
