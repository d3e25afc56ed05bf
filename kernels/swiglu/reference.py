"""The MLP of the DiT: w2 (silu(w1 x) · w3 x), without biases (specification B.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """x (…, D); w1, w3 (I, D), w2 (D, I) to (…, D)."""
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
