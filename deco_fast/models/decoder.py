"""The pixel decoder as a module: it holds the parameters, the op does the work."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast import ops
from deco_fast.kernels.pixel_decoder.reference import (
    NORM_EPS,
    POSITION_FEATURES,
    BlockParameters,
    PixelDecoderParameters,
    PositionKind,
)
from deco_fast.models.config import PixelDecoderConfig
from deco_fast.models.plain import plain


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that begins with Xavier's weights and no bias."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that gives zero at first."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class DecoderBlock(nn.Module):
    """Parameters of one AdaLN-Zero block over the decoder's C channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        fc1, fc2 = xavier_linear(channels, channels), xavier_linear(channels, channels)
        self.mlp = nn.Sequential(fc1, nn.SiLU(), fc2)
        self.modulation = zero_linear(channels, 3 * channels)

    def op_parameters(self) -> BlockParameters:
        """The weights in the op's order."""
        fc1, fc2 = plain(self.mlp[0]), plain(self.mlp[2])
        modulation = plain(self.modulation)
        return BlockParameters(
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            modulation_weight=modulation.weight,
            modulation_bias=modulation.bias,
            fc1_weight=fc1.weight,
            fc1_bias=fc1.bias,
            fc2_weight=fc2.weight,
            fc2_bias=fc2.bias,
        )


class PixelDecoder(nn.Module):
    """From the noisy image and the DiT's tokens to the velocity; `ops.pixel_decoder` (B.5).

    The op reads the layers' weights and never calls the layers: hooks on them are not called, and
    one that was replaced, by an adapter for instance, is refused.

    Args:
        config: the network's shape.
        position: the kind of position features.
        own_patch_size: above 1, what the decoder takes for a pixel is a patch of that side, its
            values as channels (paper, Table 4c).
    """

    def __init__(
        self,
        config: PixelDecoderConfig,
        position: PositionKind = "product",
        own_patch_size: int = 1,
    ) -> None:
        super().__init__()
        channels = config.decoder_hidden_size
        values = config.in_channels * own_patch_size**2
        self.position: PositionKind = position
        self.own_patch_size = own_patch_size
        self.patch_size = config.patch_size // own_patch_size
        self.pixel_embedder = nn.Linear(values + POSITION_FEATURES, channels)
        self.input_proj = xavier_linear(channels, channels)
        self.upsample = xavier_linear(config.hidden_size, self.patch_size**2 * channels)
        self.blocks = nn.ModuleList(DecoderBlock(channels) for _ in range(config.decoder_depth))
        self.output = zero_linear(channels, values)

    def op_parameters(self) -> PixelDecoderParameters:
        """The weights in the op's order.

        Raises:
            TypeError: a layer was replaced by one that computes something else.
        """
        upsample, embedder = plain(self.upsample), plain(self.pixel_embedder)
        input_proj, output = plain(self.input_proj), plain(self.output)
        return PixelDecoderParameters(
            upsample_weight=upsample.weight,
            upsample_bias=upsample.bias,
            pixel_embedder_weight=embedder.weight,
            pixel_embedder_bias=embedder.bias,
            input_proj_weight=input_proj.weight,
            input_proj_bias=input_proj.bias,
            blocks=tuple(cast(DecoderBlock, block).op_parameters() for block in self.blocks),
            output_weight=output.weight,
            output_bias=output.bias,
        )

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, C, H, W), tokens (B, L, D) to the velocity (B, C, H, W)."""
        parameters, own = self.op_parameters(), self.own_patch_size
        if own == 1:
            return ops.pixel_decoder(x, tokens, parameters, self.patch_size, self.position)
        x = F.pixel_unshuffle(x, own)
        velocity = ops.pixel_decoder(x, tokens, parameters, self.patch_size, self.position)
        return F.pixel_shuffle(velocity, own)
