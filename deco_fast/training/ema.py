"""The exponential moving average of the weights, which images are drawn with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from deco_fast.models.deco import DeCo


class ExponentialMovingAverage:
    """e ← decay·e + (1 − decay)·p after every optimizer step, in float32 (B.9).

    It begins as a copy of the initial weights; no warm-up, no bias correction.

    Attributes:
        model: a DeCo with the averaged weights, in eval mode.
    """

    def __init__(self, model: DeCo, decay: float) -> None:
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self.decay = decay
        self._averaged: list[Tensor] = list(self.model.parameters())
        self._weights = list(model.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Draw the average towards the current weights."""
        torch._foreach_lerp_(self._averaged, [p.float() for p in self._weights], 1 - self.decay)
