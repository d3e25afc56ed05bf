"""Stopping before a time limit, as batch systems set, with the checkpoint written."""

from __future__ import annotations

import re
import time

from deco_fast.errors import UserError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 3h30m, 90m or 45s.

    Raises:
        UserError: it is none.
    """
    if not re.fullmatch(r"(\d+[dhms])+", text):
        raise UserError(f"--max-time {text} is no duration: write 3h30m, 90m or 45s")
    return float(sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+)([dhms])", text)))


class TimeLimit:
    """Whether it is time to save and stop.

    Args:
        end: on the clock of `time.monotonic`; None is no limit.
        save_seconds: what the first checkpoint is expected to take.
    """

    def __init__(self, end: float | None, save_seconds: float) -> None:
        self._end = end
        self._save = save_seconds
        self._slowest_step = 0.0
        self._last = time.monotonic()

    def step_made(self) -> None:
        """Count the time since the last step, or since a checkpoint."""
        now = time.monotonic()
        self._slowest_step = max(self._slowest_step, now - self._last)
        self._last = now

    def saved(self, seconds: float) -> None:
        """Learn what a checkpoint takes."""
        self._save = max(self._save, seconds)
        self._last = time.monotonic()

    @property
    def is_near(self) -> bool:
        """Whether another step and two checkpoints, or the last two, could come too late."""
        if self._end is None:
            return False
        return time.monotonic() + 2 * (self._slowest_step + self._save) > self._end
