"""Large products on a CPU, by the fastest path there is: csrc/matmul.cpp or torch's libraries.

Ours takes operands as they lie, in either dtype, and reaches nine tenths of what an AMD processor
can multiply, where MKL reaches two thirds, as it does not know their AVX-512. oneDNN is slow in
bfloat16 without a processor's help. `csrc/matmul_op.h` says which is taken.
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
        out: (M, N), contiguous, of the dtype of a; with `add` float32. The library rounds a
            product to the dtype of a before it is added.
    """
    if _C.prefers_matmul(a):
        _C.matmul(_dense(a), _dense(b), out, add)
    elif add:
        out += a @ b
    else:
        torch.mm(a, b, out=out)


def _dense(matrix: Tensor) -> Tensor:
    # Not `contiguous`: any strides will do for it where there is one element or none.
    dense = 1 in matrix.stride()
    return matrix if dense else matrix.clone(memory_format=torch.contiguous_format)
