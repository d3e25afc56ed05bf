"""Weights and inputs that make every part of the network matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deco_fast.models.config import DeCoConfig

TRIAL_CONFIG = DeCoConfig(hidden_size=32, depth=1, num_heads=2, patch_size=8, decoder_depth=1)
"""A tiny network, to see that the suite works."""


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Draw all parameters anew, of a size that keeps activations near 1.

    DeCo is born with a velocity of exactly zero: variants would agree whatever they compute.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values *= parameter.shape[-1] ** -0.5
        else:
            values *= 0.1
            if "norm" in name and name.endswith("weight"):
                values += 1
        parameter.copy_(values)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
