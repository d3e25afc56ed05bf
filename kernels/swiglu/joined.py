"""SwiGLU for the matrix units of a GPU: two products where there were three, of widths they like.

w1 and w3 stand one below the other in one weight. The inner width is filled up with zeros to a
multiple of 16, for products with rows of other lengths fall back to kernels at half the speed, and
DeCo-L's is 2,730. Zeros add nothing, and the gradient of the filling is dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16


def join(w1: Tensor, w3: Tensor) -> Tensor:
    """(I, D) and (I, D) to (2·I', D), I' the next multiple of 16."""
    rest = -len(w1) % MULTIPLE
    return torch.cat([F.pad(w1, (0, 0, 0, rest)), F.pad(w3, (0, 0, 0, rest))])


def fill(w2: Tensor) -> Tensor:
    """(D, I) to (D, I')."""
    return F.pad(w2, (0, -w2.shape[1] % MULTIPLE))


def swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """See `deco_fast.ops.swiglu`."""
    if torch.is_autocast_enabled(x.device.type):
        # Before they are joined: half the bytes.
        w1, w3, w2 = (w.to(torch.get_autocast_dtype(x.device.type)) for w in (w1, w3, w2))
    gate, value = F.linear(x, join(w1, w3)).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, fill(w2))
