"""The large products around the pixel decoder on a CPU, by the better of torch's libraries.

In bfloat16 torch uses oneDNN, which is slow without a processor's help: on Intel's AVX-512 without
a matrix unit it takes 1.7 times as long as float32, without bfloat16 instructions 4 times, with
AVX2 alone 9 times. There the operands are widened, some rows at a time, and the sums rounded:
float32 is what they are added up in anyway.

In float32 it uses MKL, which is as fast on Intel's processors. On AMD's it has no AVX-512 and
reaches half of oneDNN's speed where the processor has; where AVX2 is all there is, MKL is the
faster one by a sixth.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_fast.kernels.capability import has_avx512, has_fast_bfloat16

_WIDENED_ROWS = 1024
"""As few as keep the product fast: the sums of these rows are still in a cache when rounded."""


def matmul_nt(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (M, K) times the transpose of b (N, K), (M, N): into `out`, or new and contiguous."""
    if a.dtype == torch.bfloat16 and not has_fast_bfloat16():
        wide = b.float()
        result = a.new_empty(a.shape[0], b.shape[0]) if out is None else out
        for rows, out in zip(a.split(_WIDENED_ROWS), result.split(_WIDENED_ROWS), strict=True):
            out.copy_(matmul_nt(rows.float(), wide))
        return result
    # oneDNN has no product of no columns, which is the gradient for an empty batch.
    if a.dtype == torch.float32 and a.shape[1] > 0 and _prefers_onednn():
        result = onednn_matmul_nt(a, b)
        return result if out is None else out.copy_(result)
    return F.linear(a, b) if out is None else torch.mm(a, b.T, out=out)


def onednn_matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """`matmul_nt` by an operator that is torch's own affair; see `has_onednn`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return result


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN and its linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _prefers_onednn() -> bool:
    """Whether MKL is there for float32 products, and slow: with AVX-512 of other makers."""
    if not (sys.platform == "linux" and torch.backends.mkl.is_available() and has_onednn()):
        return False
    if not has_avx512():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
