"""The most that a GPU computes, for the model FLOPs utilisation (MFU)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """FLOP/s of dense products, without sparsity: bf16 on the tensor cores, fp32 beside them."""

    bf16: float
    fp32: float


# From NVIDIA's data sheets. The first name that a device's name contains counts.
_PEAKS = {
    "H200": Peak(989e12, 67e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100": Peak(989e12, 67e12),
    "GH200": Peak(989e12, 67e12),
    "B200": Peak(2250e12, 75e12),
    "A100": Peak(312e12, 19.5e12),
    "L40S": Peak(362e12, 91.6e12),
    "RTX 4090": Peak(165.2e12, 82.6e12),
    "RTX 3090": Peak(71e12, 35.6e12),
}


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Dense FLOP/s of a GPU by its CUDA name; None where it is not known, or it is a part (MIG)."""
    if "MIG" in device_name:
        return None
    for name, peak in _PEAKS.items():
        if name in device_name:
            return peak.bf16 if bf16 else peak.fp32
    return None


def device_peak(device: torch.device, bf16: bool) -> float | None:
    """`peak_flops` of a device; None for a CPU."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), bf16)
