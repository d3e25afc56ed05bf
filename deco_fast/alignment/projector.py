"""REPA: a layer of the DiT is drawn towards DINOv2's features (specification B.7, paper 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.models.deco import DeCo


class AlignedDeCo(nn.Module):
    """What is trained with REPA: DeCo, and a projector of one DiT block's output.

    Both come out of one forward, as distributed data parallelism and sharding require.

    Args:
        model: the network.
        layer: 1-based number of the DiT block whose output is aligned; 8 in the paper.
        feature_size: channels of the target features; 768 for DINOv2-B.
        hidden_size: of the projector; None is the DiT's, as published.

    Attributes:
        model: the DeCo, which alone is exported and averaged.
        projector: Linear, SiLU, Linear, SiLU, Linear in torch's default initialisation; used in
            training only.

    Raises:
        ValueError: the layer does not exist.
    """

    def __init__(
        self, model: DeCo, layer: int, feature_size: int, hidden_size: int | None = None
    ) -> None:
        super().__init__()
        if not 1 <= layer <= model.config.depth:
            raise ValueError(f"layer {layer} does not exist: blocks are 1 … {model.config.depth}")
        hidden_size = hidden_size or model.config.hidden_size
        self.model = model
        self.layer = layer
        self.projector = nn.Sequential(
            nn.Linear(model.config.hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, feature_size),
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity (B, C, H, W) and the projected tokens (B, L, feature_size).

        Args:
            x, t, y: as for `DeCo.forward`.
        """
        tokens, (features,) = self.model.encode(x, t, y, return_layers=(self.layer,))
        return self.model.decode(x, tokens), self.projector(features)


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """1 − the mean cosine between projected tokens and their targets, in [0, 2], float32.

    Args:
        projected: (B, L, D), from `AlignedDeCo`.
        features: (B, N, D) of the frozen encoder, N ≤ L: as published, the first N tokens count.

    Raises:
        ValueError: the shapes do not fit.
    """
    batch, length, channels = features.shape
    if projected.shape[::2] != (batch, channels) or projected.shape[1] < length:
        raise ValueError(
            f"projected tokens {tuple(projected.shape)} do not fit features "
            f"{tuple(features.shape)}: batch and channels must agree, and no token be missing"
        )
    with torch.autocast(projected.device.type, enabled=False):
        cosine = F.cosine_similarity(projected[:, :length].float(), features.float(), dim=-1)
        return 1 - cosine.mean()
