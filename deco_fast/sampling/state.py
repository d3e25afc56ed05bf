"""What can be seen of a batch while it is drawn."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """Where a batch is between two evaluations of the model.

    The tensors are the engine's own memory and change with the next evaluation: clone what is to
    be kept.

    Attributes:
        evaluation: evaluations that are done, from 0.
        t: the time of x, at which the next evaluation is made: 0 is noise, 1 the finished image.
        x: (B, C, H, W), about [−1, 1] at t = 1.
        velocity: (B, C, H, W), guided, of the newest evaluation; before the first one, zeros.
    """

    evaluation: int
    t: float
    x: Tensor
    velocity: Tensor

    def clean_estimate(self) -> Tensor:
        """x + (1 − t)·velocity, (B, C, H, W): where a straight path from here ends."""
        return self.x + (1 - self.t) * self.velocity
