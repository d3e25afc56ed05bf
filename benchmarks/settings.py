"""What the command line asked for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from benchmarks.memory import available_memory


@dataclass(frozen=True)
class Settings:
    """The command line, resolved.

    Attributes:
        device: where everything runs.
        batch: of the tests at DeCo-XL shapes; 1 on the CPU, 32 on a GPU.
        seconds: for the rounds of one comparison, compilation not counted; 0 is a single round.
        trial: tiny shapes, to see that the suite works.
    """

    device: torch.device
    batch: int
    seconds: float
    trial: bool

    @classmethod
    def from_options(cls, config: pytest.Config) -> Settings:
        """Read pytest's options.

        Raises:
            pytest.UsageError: one is out of range.
        """
        device = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in ("cpu", "cuda"):
            raise pytest.UsageError(f"--device {device}: choose cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU here; leave it out")
        batch, seconds = config.getoption("batch"), config.getoption("seconds")
        if batch is not None and batch < 1:
            raise pytest.UsageError(f"--batch {batch}: must be at least 1")
        if not seconds > 0:
            raise pytest.UsageError(f"--seconds {seconds}: must be above 0")
        trial = config.getoption("trial")
        return cls(
            device=torch.device(device),
            batch=batch or (32 if device == "cuda" and not trial else 1),
            seconds=0.0 if trial else seconds,
            trial=trial,
        )

    def require_memory(self, bytes_needed: float) -> None:
        """Skip the test unless so much memory is free, and a tenth more."""
        available = available_memory(self.device)
        if available < 1.1 * bytes_needed:
            pytest.skip(
                f"needs {1.1 * bytes_needed / 2**30:.1f} GiB of memory, "
                f"{available / 2**30:.1f} are free"
            )
