"""8-bit floating-point products in the DiT, by torchao; for GPUs that have them (sm_89 and later).

Weights and activations are float8_e4m3, each row with a scale of its own, the activations' found
at every call. Off unless asked for: it trades accuracy for speed.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from deco_fast.errors import UserError

_CAPABILITY = (8, 9)


def fp8_problem(device: torch.device) -> str | None:
    """Why fp8 cannot be used on this device, or None."""
    if device.type != "cuda":
        return f"fp8 needs a GPU of sm_89 or later, not {device}: draw with --dtype bf16"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"fp8 needs a GPU of sm_89 or later, not {name}: draw with --dtype bf16"
    if importlib.util.find_spec("torchao") is None:
        return "fp8 needs torchao: pip install torchao, or draw with --dtype bf16"
    return None


def to_fp8(blocks: nn.Module) -> None:
    """Quantise the linear layers of prepared blocks in place.

    Raises:
        UserError: it cannot be used on their device.
    """
    device = next(blocks.parameters(), torch.empty(0)).device
    if problem := fp8_problem(device):
        raise UserError(problem)
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
