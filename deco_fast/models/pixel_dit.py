"""The pixel DiT, the paper's baseline: DeCo's DiT with one linear layer in place of the decoder.

All that a patch shall become must pass through its token. Predicting the clean image and not the
velocity makes it JiT (specification B.6, B.7).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.flow import image_to_velocity
from deco_fast.kernels.layout import unpatchify
from deco_fast.models.card import ModelCard
from deco_fast.models.class_conditional import ClassConditional
from deco_fast.models.config import ClassConfig, PixelDiTConfig
from deco_fast.models.decoder import zero_linear

NORM_EPS = 1e-6


def final_norm(s: Tensor, modulation: Tensor) -> Tensor:
    """layer_norm(s)·(1 + scale) + shift: tokens (B, L, D), modulation (B, 1 or L, 2·D)."""
    shift, scale = modulation.chunk(2, dim=-1)
    return F.layer_norm(s, s.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class PatchOutput(nn.Module):
    """A token becomes its patch, by one linear layer that gives zero at first."""

    def __init__(self, config: ClassConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.output = zero_linear(config.hidden_size, config.in_channels * config.patch_size**2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) to (B, C, H, W); of the image x only the size is read."""
        return unpatchify(self.output(tokens), x.shape[-2], x.shape[-1], self.patch_size)


class PixelDiT(ClassConditional):
    """Class-conditional pixel DiT; with `config.prediction` "image" JiT.

    At first the prediction is zero.
    """

    config: PixelDiTConfig

    def __init__(self, config: PixelDiTConfig, card: ModelCard | None = None) -> None:
        super().__init__(config, card)
        self.modulation = zero_linear(config.hidden_size, 2 * config.hidden_size)

    def make_decoder(self) -> nn.Module:
        return PatchOutput(self.config)

    def final_modulation(self, *conditions: Tensor) -> tuple[Tensor, ...]:
        return (self.modulation(conditions[0]),)

    def decoder_condition(self, s: Tensor, temb: Tensor, *modulation: Tensor) -> Tensor:
        return final_norm(s, *modulation)

    def to_velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.config.prediction == "velocity":
            return prediction
        return image_to_velocity(prediction, x, t)

    def target(self, x: Tensor, noise: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """With `config.prediction` "image" it is shorter than x − noise from t = 0.95 on."""
        if self.config.prediction == "velocity":
            return super().target(x, noise, noisy, t)
        return image_to_velocity(x, noisy, t)
