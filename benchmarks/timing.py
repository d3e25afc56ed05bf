"""Timing variants in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch

# A sample shorter than this is mostly the clock's and the scheduler's noise: short functions are
# called several times for one sample. A GPU's events are exact to half a microsecond.
MIN_SAMPLE_SECONDS = 5e-3

# For so many cycles, about 2 ms, the GPU idles before a sample. The host orders work ahead in the
# meantime, as it does in a training run, so that its slowness does not count as the kernels'.
HEAD_START_CYCLES = 4_000_000

# More than any GPU's L2 cache: overwriting it before a sample makes every variant start cold.
CACHE_FLUSH_BYTES = 256 * 2**20


class Clock:
    """Seconds that a function takes on a device.

    On a GPU it begins with cold caches, and with work of the host's ordered ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.min_sample_seconds = MIN_SAMPLE_SECONDS
        if device.type == "cuda":
            self.min_sample_seconds = 0
            self._flush = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.uint8, device=device)
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, function: Callable[[], object], calls: int = 1) -> float:
        """Mean seconds of one call, over ``calls`` of them in a row."""
        if self.device.type == "cuda":
            return self._on_gpu(function, calls)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def _on_gpu(self, function: Callable[[], object], calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            self._flush.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
            self._start.record()
            function()
            self._end.record()
            self._end.synchronize()
            seconds += self._start.elapsed_time(self._end) / 1e3
        return seconds / calls


class Turns:
    """Functions that are timed in turns, so that what disturbs the machine disturbs them all.

    Attributes:
        samples: for every function's name the seconds per call, one entry for each round.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[[], object]],
        clock: Callable[[Callable[[], object], int], float],
        min_sample_seconds: float = MIN_SAMPLE_SECONDS,
    ) -> None:
        self.samples: dict[str, list[float]] = {name: [] for name in functions}
        self._functions = dict(functions)
        self._clock, self._min_sample_seconds = clock, min_sample_seconds
        self._calls = dict.fromkeys(functions, 1)
        self._rounds = 0

    def calibrate(self) -> float:
        """Choose how many calls make a sample; returns the seconds that a round will take."""
        total = 0.0
        for name, function in self._functions.items():
            seconds = self._clock(function, 1)
            self._calls[name] = max(1, math.ceil(self._min_sample_seconds / max(seconds, 1e-9)))
            total += seconds * self._calls[name]
        return total

    def round(self) -> None:
        """Take one sample of every function.

        Each round begins with another one: none always runs after the same neighbour, whose
        leavings in the caches it would inherit.
        """
        names = list(self._functions)
        first = self._rounds % len(names)
        for name in names[first:] + names[:first]:
            seconds = self._clock(self._functions[name], self._calls[name])
            self.samples[name].append(seconds)
        self._rounds += 1
