"""From the CPU to where a model is, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a device, in its shape and dtype; on a GPU the copy is ordered and not waited for.

    From memory that is not pinned it would wait for all that the GPU still has to do.
    """
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
