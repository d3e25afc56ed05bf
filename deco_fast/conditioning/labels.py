"""Class labels as conditions, and their dropout for classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_labels(
    y: Tensor,
    null_class: int,
    probability: float,
    generator: torch.Generator | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """Replace each label of y (B,) by the null class with the given probability in [0, 1].

    A label falls where u < probability; u (B,) in [0, 1) is drawn from the generator unless
    given (specification B.7).
    """
    if u is None:
        u = torch.rand(y.shape, generator=generator, device=y.device)
    return torch.where(u < probability, null_class, y)
