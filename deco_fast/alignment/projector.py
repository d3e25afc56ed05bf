"""What REPA adds to the training: a projector of a DiT layer and a cosine loss (B.7)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.kernels.autocast import without_autocast


class Projector(nn.Sequential):
    """Linear, SiLU, Linear, SiLU, Linear: a DiT block's output to the encoder's channels.

    Used in training only. It begins in torch's default initialisation, and its tensors have the
    published names ("0.weight" … "4.bias") without their prefix.

    Args:
        in_size: width of the DiT.
        hidden_size: of the two inner layers; the DiT's width, as published.
        out_size: channels of the encoder's features; 768 for DINOv2-B.
    """

    def __init__(self, in_size: int, hidden_size: int, out_size: int) -> None:
        super().__init__(
            nn.Linear(in_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, out_size),
        )


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """1 − the mean cosine between projected tokens and their targets, in [0, 2], float32.

    Args:
        projected: (B, L, D), from `Projector`.
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
    with without_autocast(projected.device.type):
        cosine = F.cosine_similarity(projected[:, :length].float(), features.float(), dim=-1)
        return 1 - cosine.mean()
