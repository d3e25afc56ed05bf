"""Weights and inputs that make every part of the network matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import DeCoConfig, DeCoT2IConfig
from deco_fast.models.presets import Preset

TRIAL_CONFIG = DeCoConfig(hidden_size=32, depth=1, num_heads=2, patch_size=8, decoder_depth=1)
"""A tiny network, to see that the suite works."""

SMALL_TEXT = Preset(
    DeCoT2IConfig(
        hidden_size=128,
        depth=4,
        num_heads=4,
        patch_size=8,
        decoder_hidden_size=16,
        text_depth=2,
        text_size=256,
        text_length=32,
    ),
    ModelCard(
        name="small-t2i",
        height=64,
        width=64,
        sampling=SamplingSettings(solver="adams", steps=25, guidance_scale=4.0, time_shift=3.0),
    ),
)
"""A text model for a laptop: 64 patches beside 32 tokens of text; DeCo-T2I has 1,024 and 128."""


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
