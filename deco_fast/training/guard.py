"""The end of learning, noticed on the device without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SETTLING_STEPS = 100
"""Steps whose mean says what a usual loss is."""


class LossGuard:
    """Stops all updates from the first step whose loss explodes or is not a number.

    The step is found out later, when its figures have reached the CPU: until then the weights
    stay those that it began with. Uses the flag that AdamW's fused kernel knows from gradient
    scalers, to leave everything as it is.

    Args:
        optimizer: a fused AdamW.
        factor: a loss beyond this many times the mean of the steps before has exploded; None
            looks for values that are not finite alone.
        device: where losses are.

    Attributes:
        tripped: a scalar on the device, 1 from the bad step on and 0 before.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: float | None, device: torch.device
    ) -> None:
        self.tripped = torch.zeros((), device=device)
        self._mean = torch.zeros((), device=device)
        self._factor = factor
        self._steps = 0
        optimizer.found_inf = self.tripped  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """What a usual loss is, so that a run that goes on knows it: mean and steps."""
        return {"mean": self._mean, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._mean.copy_(state["mean"])
        self._steps = state["steps"]

    def check(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Look at a step, the same in all processes, before its update.

        Args:
            loss: scalar on the device, the mean over all processes.
            gradient_norm: likewise.
        """
        good = loss.isfinite() & gradient_norm.isfinite()
        if self._factor is not None and self._steps >= _SETTLING_STEPS:
            good &= loss <= self._factor * self._mean
        self.tripped.copy_(torch.maximum(self.tripped, 1 - good.float()))
        self._steps += 1
        self._mean.lerp_(loss.float(), 1 / min(self._steps, _SETTLING_STEPS))
