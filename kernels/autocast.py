"""Arithmetic in the dtype of its operands, whatever autocast says outside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast is off inside the block. The meta device, which counts FLOPs, has none."""
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
