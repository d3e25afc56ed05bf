"""PixDDT, a baseline: DDT's split into condition encoder and velocity decoder, on pixels.

No configuration of it is published; this is our reading of the paper's words. The DiT encodes the
condition. The decoder is a second, short DiT on the same patches of the same noisy image, whose
blocks are modulated by what the encoder says at each token, silu(temb + s), where DeCo's decoder
works on single pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from deco_fast.kernels.layout import patchify
from deco_fast.models.card import ModelCard
from deco_fast.models.class_conditional import ClassConditional
from deco_fast.models.config import PixDDTConfig
from deco_fast.models.decoder import zero_linear
from deco_fast.models.dit import DiTBlock
from deco_fast.models.embeddings import rotary_table
from deco_fast.models.pixel_dit import PatchOutput, final_norm


class VelocityDecoder(nn.Module):
    """DiT blocks under a condition for each token; zero at first."""

    def __init__(self, config: PixDDTConfig) -> None:
        super().__init__()
        self.patch_size, self.head_dim = config.patch_size, config.head_dim
        patch_values = config.in_channels * config.patch_size**2
        self.patch_embedder = nn.Linear(patch_values, config.hidden_size)
        nn.init.xavier_uniform_(self.patch_embedder.weight)
        nn.init.zeros_(self.patch_embedder.bias)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.decoder_depth))
        self.modulation = zero_linear(config.hidden_size, 2 * config.hidden_size)
        self.to_patches = PatchOutput(config)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, C, H, W) under the encoder's tokens (B, L, D) to (B, C, H, W)."""
        rows, columns = (side // self.patch_size for side in x.shape[-2:])
        rotary = rotary_table(rows, columns, self.head_dim, x.device)
        h = self.patch_embedder(patchify(x, self.patch_size))
        for block in self.blocks:
            h = block(h, tokens, rotary)
        return self.to_patches(x, final_norm(h, self.modulation(tokens)))


class PixDDT(ClassConditional):
    """Class-conditional PixDDT: `decode(x, encode(x, t, y))` is the velocity, zero at first."""

    config: PixDDTConfig

    def __init__(self, config: PixDDTConfig, card: ModelCard | None = None) -> None:
        super().__init__(config, card)

    def make_decoder(self) -> nn.Module:
        return VelocityDecoder(self.config)
