"""The figures of steps on their way from the device to people."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from deco_fast.data.loader import Batch
from deco_fast.training.step import StepFigures
from deco_fast.transfer import begin_to_cpu


class MadeStep(NamedTuple):
    """A step whose figures are known.

    Attributes:
        step: 1-based.
        batch: what it was made with.
        values: by name.
    """

    step: int
    batch: Batch
    values: dict[str, float]


class _Pending(NamedTuple):
    step: int
    batch: Batch
    names: tuple[str, ...]
    values: Callable[[], tuple[Tensor, ...]]


class FigureReader:
    """Reads figures off the device without holding it up.

    On a GPU those of a step are read while it computes the next one, on the CPU at once.
    """

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def push(self, step: int, batch: Batch, figures: StepFigures) -> list[MadeStep]:
        """Hand in the figures of a step (1-based); returns those that are known by now."""
        values = begin_to_cpu(figures.values)
        made = self.flush()
        self._pending = _Pending(step, batch, figures.names, values)
        return made if figures.values.is_cuda else made + self.flush()

    def flush(self) -> list[MadeStep]:
        """Wait for what was handed in."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        (values,) = pending.values()
        by_name = dict(zip(pending.names, values.tolist(), strict=True))
        return [MadeStep(pending.step, pending.batch, by_name)]


class Window:
    """Means over the steps since the last report.

    Attributes:
        waited: seconds spent waiting for data.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._began = time.perf_counter()
        self.waited = 0.0

    def add(self, values: dict[str, float]) -> None:
        """Count a step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def report(self) -> dict[str, float]:
        """The means, "speed/steps_per_second" and "speed/data_wait_share", and begin anew."""
        elapsed = time.perf_counter() - self._began
        means = {name: total / self._steps for name, total in self._sums.items()}
        means["speed/steps_per_second"] = self._steps / elapsed
        means["speed/data_wait_share"] = self.waited / elapsed
        self._reset()
        return means
