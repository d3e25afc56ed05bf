"""What networks for class labels do alike: DeCo and the baselines that share its DiT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.models.card import ModelCard
from deco_fast.models.config import ClassConfig
from deco_fast.models.dit import DiTBlock
from deco_fast.models.embeddings import TimestepEmbedder, rotary_table
from deco_fast.models.network import DeCoNetwork


class ClassConditional(DeCoNetwork):
    """A network whose condition y is a class label; its subclass says what the decoder is.

    Any height and width divisible by the patch size; the weights do not depend on them. The DiT's
    weights begin as published (specification B.8), no block at zero.

    Attributes:
        config: the network's shape.
        card: what the tensors cannot tell, where it is known.
    """

    config: ClassConfig

    def __init__(self, config: ClassConfig, card: ModelCard | None = None) -> None:
        super().__init__()
        self.config = config
        self.card = card
        self.patch_embedder = nn.Linear(
            config.in_channels * config.patch_size**2, config.hidden_size
        )
        self.timestep_embedder = TimestepEmbedder(config.hidden_size)
        self.class_embedder = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.decoder = self.make_decoder()
        nn.init.xavier_uniform_(self.patch_embedder.weight)
        nn.init.zeros_(self.patch_embedder.bias)
        nn.init.normal_(self.class_embedder.weight, std=config.class_embedding_std)

    def make_decoder(self) -> nn.Module:
        """A new decoder, which `decode` calls: x (B, C, H, W), tokens (B, L, D) → prediction."""
        raise NotImplementedError

    def rotary_table(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        return rotary_table(height, width, self.config.head_dim, device)

    def _conditions(self, temb: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (F.silu(temb + self._embed_class(y)[:, None]),)

    def _embed_class(self, y: Tensor) -> Tensor:
        try:
            return self.class_embedder(y)
        except IndexError as error:  # a GPU would have to be waited for to know
            raise ValueError(
                f"y must be labels 0 … {self.config.num_classes - 1}, or {self.config.num_classes} "
                f"for the null class, not {y.min()} … {y.max()}"
            ) from error

    def _check_conditions(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        null = self.config.num_classes
        if y is None:
            raise ValueError(
                f"y must be class labels (B,), not None; the null class is {null} "
                "(config.num_classes)"
            )
        if y.dtype not in (torch.int64, torch.int32) or y.ndim != 1 or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"y must be int64 labels ({x.shape[0]},), not {y.dtype} {tuple(y.shape)}"
            )
        super()._check_conditions(x, t, y)
