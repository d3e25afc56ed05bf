"""Large products on a CPU, by the fastest path there is: csrc/matmul.cpp or torch's libraries.

Ours is made for operands as they lie, in either dtype, and reaches nine tenths of what the
processor can multiply. MKL has no AVX-512 on AMD's processors, and of their AVX2 two thirds;
oneDNN is slow in bfloat16 without a processor's help.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deco_fast import _C


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a · b, or with `add` out + a · b, with sums in float32.

    Args:
        a: (M, K), float32 or bfloat16; copied where none of its strides is 1.
        b: (K, N), likewise, of the dtype of a.
        out: (M, N), float32 or bfloat16, contiguous.
    """
    if _C.prefers_matmul(a):
        _C.matmul(_dense(a), _dense(b), out, add)
    elif add:
        out += a @ b
    else:
        torch.mm(a, b, out=out)


def _dense(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()
