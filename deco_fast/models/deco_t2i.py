"""DeCo for prompts: image tokens attend to themselves and to a refined text (B.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.errors import UserError
from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoT2IConfig
from deco_fast.models.decoder import PixelDecoder
from deco_fast.models.dit import JointBlock, TextBlock
from deco_fast.models.embeddings import TimestepEmbedder, rotary_table
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.norm import RMSNorm
from deco_fast.models.presets import preset


class TextEmbedder(nn.Module):
    """Text features (B, T, text_size) to the DiT's width, normalised."""

    def __init__(self, text_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(text_size, hidden_size)
        self.norm = RMSNorm(hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(self.proj(y))


class DeCoT2I(DeCoNetwork):
    """Text-conditional DeCo: `decode(x, encode(x, t, y))` is the velocity.

    y are the features of a text encoder (`deco_fast.conditioning.qwen3`), one vector for each of
    `config.text_length` tokens. Padding is attended like any token, as published. The unconditional
    model is the one of the empty prompt. Weights begin as published (B.8).

    Attributes:
        config: the network's shape.
        card: what the tensors cannot tell, where it is known.
    """

    config: DeCoT2IConfig

    def __init__(self, config: DeCoT2IConfig, card: ModelCard | None = None) -> None:
        super().__init__()
        self.config = config
        self.card = card
        self.patch_embedder = nn.Linear(
            config.in_channels * config.patch_size**2, config.hidden_size
        )
        self.timestep_embedder = TimestepEmbedder(config.hidden_size)
        self.text_embedder = TextEmbedder(config.text_size, config.hidden_size)
        self.text_position = nn.Parameter(torch.randn(1, config.text_length, config.hidden_size))
        self.text_blocks = nn.ModuleList(TextBlock(config) for _ in range(config.text_depth))
        self.blocks = nn.ModuleList(JointBlock(config) for _ in range(config.depth))
        self.decoder = PixelDecoder(config, position="axial")
        nn.init.xavier_uniform_(self.patch_embedder.weight)
        nn.init.zeros_(self.patch_embedder.bias)

    @classmethod
    def from_preset(cls, name: str = "deco-t2i") -> DeCoT2I:
        """A freshly initialised model: "deco-t2i".

        Raises:
            UserError: there is no such preset, or it is of a class model.
        """
        config, card = preset(name)
        if not isinstance(config, DeCoT2IConfig):
            raise UserError(f"{name} draws from class labels: use DeCo.from_preset")
        return cls(config, card)

    def refine_text(self, y: Tensor, temb: Tensor) -> Tensor:
        """The text that every DiT block attends to: a function of prompt and time alone.

        Args:
            y: text features (B, text_length, text_size).
            temb: time embeddings (B, 1, D).

        Returns:
            (B, text_length, D).
        """
        condition = F.silu(temb)
        text = self.text_embedder(y.to(self.dtype)) + self.text_position
        for block in self.text_blocks:
            text = block(text, condition)
        return text

    def rotary_table(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        # Columns up to the number of rows and rows up to that of columns: as published.
        return rotary_table(height, width, self.config.head_dim, device, extent=(width, height))

    def _conditions(self, temb: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return F.silu(temb), self.refine_text(y, temb)

    def _check_conditions(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        expected = (x.shape[0], self.config.text_length, self.config.text_size)
        if y is None or not y.is_floating_point() or tuple(y.shape) != expected:
            given = "None" if y is None else f"{y.dtype} {tuple(y.shape)}"
            raise ValueError(f"y must be text features {expected}, not {given}")
        super()._check_conditions(x, t, y)
