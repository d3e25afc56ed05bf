"""The exponential moving average of the weights, which images are drawn with."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deco_fast.models.network import DeCoNetwork


class ExponentialMovingAverage:
    """e ← decay·e + (1 − decay)·p after every optimizer step, in float32 (B.9).

    It begins as a copy of the initial weights; no warm-up, no bias correction. On a GPU the
    average is drawn on a stream of its own, beside the next step's forward.

    Args:
        model: whose weights are averaged.
        decay: in [0, 1].

    Attributes:
        model: a DeCo with the averaged weights, in eval mode.
    """

    def __init__(self, model: DeCoNetwork, decay: float) -> None:
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self._average = get_ema_multi_avg_fn(decay)
        self._source = model
        device = model.patch_embedder.weight.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @functools.cached_property
    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The average and the weights; listed once, as that takes a millisecond, and not before
        the first update, as FSDP2 puts others in their place."""
        return list(self.model.parameters()), list(self._source.parameters())

    def update(self) -> None:
        """Draw the average towards the network's present weights; `wait` before they change."""
        if self._stream is None:
            self._average(*self._pairs, 0)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._average(*self._pairs, 0)

    def wait(self) -> None:
        """Let the device finish an update before it does what is asked of it next."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
