"""The pixel decoder of the paper's ablation: the condition is stacked, as in a UNet.

In place of AdaLN's shift, scale and gate the upsampled condition is concatenated to a block's
features, and one linear layer brings both back to C channels before the block's MLP:

    h = h + fc2(silu(fc1(mix([layer_norm(h), y]))))

Plain operations: of what `deco_fast.ops` fuses, the modulation, nothing is left here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast import ops
from deco_fast.kernels.layout import from_pixels
from deco_fast.kernels.pixel_decoder.reference import (
    NORM_EPS,
    POSITION_FEATURES,
    pixel_features,
)
from deco_fast.models.config import DeCoConfig
from deco_fast.models.decoder import xavier_linear, zero_linear
from deco_fast.models.plain import plain


class ConcatBlock(nn.Module):
    """A residual MLP over the features and the condition beside them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.mix = xavier_linear(2 * channels, channels)
        self.mlp = nn.Sequential(
            xavier_linear(channels, channels), nn.SiLU(), xavier_linear(channels, channels)
        )

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """Pixels h and their conditions y, each (N, p², C), to (N, p², C)."""
        return h + self.mlp(self.mix(torch.cat([self.norm(h), y], dim=-1)))


class ConcatDecoder(nn.Module):
    """From the noisy image and the DiT's tokens to the velocity, zero at first."""

    def __init__(self, config: DeCoConfig) -> None:
        super().__init__()
        channels = config.decoder_hidden_size
        self.patch_size = config.patch_size
        self.pixel_embedder = nn.Linear(config.in_channels + POSITION_FEATURES, channels)
        self.input_proj = xavier_linear(channels, channels)
        self.upsample = xavier_linear(config.hidden_size, config.patch_size**2 * channels)
        self.blocks = nn.ModuleList(ConcatBlock(channels) for _ in range(config.decoder_depth))
        self.output = zero_linear(channels, config.in_channels)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, C, H, W), tokens (B, L, D) to the velocity (B, C, H, W)."""
        upsample = plain(self.upsample)
        y = ops.linear_upsample(tokens, upsample.weight, upsample.bias, self.patch_size)
        h = self.input_proj(self.pixel_embedder(pixel_features(x, self.patch_size)))
        for block in self.blocks:
            h = block(h, y)
        velocity = self.output(F.layer_norm(h, h.shape[-1:], eps=NORM_EPS))
        return from_pixels(velocity, x.shape[-2], x.shape[-1], self.patch_size)
