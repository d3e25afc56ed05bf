"""REPA's frozen encoder, for a machine without its weights."""

from __future__ import annotations

import torch

from deco_fast.alignment.dinov2 import DINOv2, random_dinov2
from deco_fast.alignment.features import Features


def random_features(device: torch.device, precision: str) -> Features:
    """DINOv2-B with random weights, in the precision of the run as `train.py` has it."""
    return Features(DINOv2(random_dinov2(), precision=precision).to(device))
