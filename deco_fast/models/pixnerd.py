"""PixNerd, a baseline: DeCo's DiT, whose tokens become the weights of a small MLP per patch.

Where DeCo's decoder is modulated by a condition per pixel, PixNerd's has a hypernetwork: every
token is mapped to the two weight matrices of an MLP, which all pixels of its patch share
(specification B.6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.kernels.layout import from_pixels
from deco_fast.kernels.pixel_decoder.reference import POSITION_FEATURES, pixel_features
from deco_fast.models.card import ModelCard
from deco_fast.models.class_conditional import ClassConditional
from deco_fast.models.config import PixNerdConfig
from deco_fast.models.norm import RMSNorm


class NerfBlock(nn.Module):
    """x += silu(norm(x) w₁) w₂ with w₁ and w₂ made of the patch's token."""

    def __init__(self, hidden_size: int, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.channels, self.inner_size = channels, channels * mlp_ratio
        self.param_generator = nn.Linear(hidden_size, 2 * channels * self.inner_size)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """Pixels x (N, p², C) under their patches' tokens (N, D) to (N, p², C)."""
        w1, w2 = self.param_generator(token).chunk(2, dim=-1)
        w1 = F.normalize(w1.unflatten(-1, (self.channels, self.inner_size)), dim=-2)
        w2 = F.normalize(w2.unflatten(-1, (self.inner_size, self.channels)), dim=-2)
        return x + torch.bmm(F.silu(torch.bmm(self.norm(x), w1)), w2)


class NerfDecoder(nn.Module):
    """From the noisy image and the DiT's tokens to the velocity, through `NerfBlock`s."""

    def __init__(self, config: PixNerdConfig) -> None:
        super().__init__()
        channels = config.decoder_hidden_size
        self.patch_size = config.patch_size
        self.pixel_embedder = nn.Linear(config.in_channels + POSITION_FEATURES, channels)
        self.blocks = nn.ModuleList(
            NerfBlock(config.hidden_size, channels, config.nerf_mlp_ratio)
            for _ in range(config.decoder_depth)
        )
        self.norm = RMSNorm(channels)
        self.output = nn.Linear(channels, config.in_channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, C, H, W) and tokens (B, L, D) to (B, C, H, W)."""
        h = self.pixel_embedder(pixel_features(x, self.patch_size))
        for block in self.blocks:
            h = block(h, tokens.flatten(0, 1))
        velocity = self.output(self.norm(h))
        return from_pixels(velocity, x.shape[-2], x.shape[-1], self.patch_size)


class PixNerd(ClassConditional):
    """Class-conditional PixNerd: `decode(x, encode(x, t, y))` is the velocity, zero at first."""

    config: PixNerdConfig

    def __init__(self, config: PixNerdConfig, card: ModelCard | None = None) -> None:
        super().__init__(config, card)

    def make_decoder(self) -> nn.Module:
        return NerfDecoder(self.config)
