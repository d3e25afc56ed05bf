"""What a person sees of a run while it goes: the bar, the scalars, the grids of samples."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Monitor:
    """Progress bar with images/s and remaining time, and TensorBoard scalars.

    Does nothing where it is not enabled (all processes but the first).
    """

    def __init__(
        self, folder: Path, *, steps: int, start_step: int, batch_size: int, enabled: bool
    ) -> None:
        self.batch_size = batch_size
        self.writer = (
            # Scalars of steps that a killed run made after its last checkpoint are made again.
            SummaryWriter(str(folder), purge_step=start_step + 1) if enabled else None
        )
        self.bar = tqdm(
            total=steps * batch_size,
            initial=start_step * batch_size,
            unit="image",
            unit_scale=True,
            desc="training",
            disable=not enabled,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def step(self) -> None:
        """One optimizer step is done."""
        self.bar.update(self.batch_size)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log figures at a step (1-based) and show the loss in the bar."""
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        rate = self.bar.format_dict["rate"]
        if rate:
            self.writer.add_scalar("speed/images_per_second", rate, step)
        self.bar.set_postfix(loss=f"{values['loss/total']:.4f}", refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.writer is not None:
            self.bar.write(line)
