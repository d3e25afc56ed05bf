"""Embeddings of time, and of a token's place in the image."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCY_CHANNELS = 256
"""Channels of the sinusoidal embedding under the timestep MLP."""


def timestep_embedding(t: Tensor, dim: int = FREQUENCY_CHANNELS) -> Tensor:
    """Sinusoids of the unscaled time, (B,) in [0, 1] to (B, dim), at least float32 (B.2).

    [cos(t·w), sin(t·w)] with w_k = 10^(−k / (dim/2)): a maximal period of 10, where other
    diffusion models scale the time by 1,000 and use 10,000. An odd dim ends with a zero.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angle = t[:, None] * 10.0**-exponent
    embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


class TimestepEmbedder(nn.Module):
    """Time (B,) to its embedding (B, hidden_size)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first = nn.Linear(FREQUENCY_CHANNELS, hidden_size)
        second = nn.Linear(hidden_size, hidden_size)
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        dtype = cast(nn.Linear, self.mlp[0]).weight.dtype
        return self.mlp(timestep_embedding(t).to(dtype))


def rotary_table(
    height: int,
    width: int,
    head_dim: int,
    device: torch.device | None = None,
    extent: tuple[float, float] = (16, 16),
) -> Tensor:
    """(cos, sin) of the rotation of every channel pair, (height·width, head_dim/2, 2), float32.

    Even pairs turn with the column, odd pairs with the row. Positions run from 0 to `extent` (of
    rows, of columns): the class model's to 16 whatever the number of tokens, so it sees one and
    the same image at every resolution (B.4). A single row or column has position 0.
    """
    y, x = (
        torch.linspace(0, end, count, device=device, dtype=torch.float32)
        for end, count in zip(extent, (height, width), strict=True)
    )
    exponent = torch.arange(0, head_dim, 4, device=device, dtype=torch.float32)
    exponent = exponent[: head_dim // 4] / head_dim
    frequency = 10000.0**-exponent
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    place = torch.stack([grid_x, grid_y], dim=-1).reshape(-1, 1, 2)
    angle = (place * frequency[:, None]).flatten(1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)
