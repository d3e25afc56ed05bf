"""What a person sees of a run while it goes: the bar, the scalars, the grids of samples."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from deco_fast.config import RunConfig
from deco_fast.errors import UserError
from deco_fast.training.peaks import device_peak
from deco_fast.training.run_folder import write_atomically
from deco_fast.training.work import count_work

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Monitor:
    """Progress bar with images/s and remaining time, TensorBoard and, where asked for, wandb.

    Does nothing where it is not enabled (all processes but the first).

    Args:
        folder: the run's.
        config: the run.
        start_step: steps already made.
        device: of this process.
        world_size: processes that share a batch.
        enabled: whether this process reports.

    Raises:
        UserError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        *,
        start_step: int,
        device: torch.device,
        world_size: int = 1,
        enabled: bool,
    ) -> None:
        self.batch_size, self._enabled = config.training.batch_size, enabled
        self.device = device
        self._folder, self._start_step = folder, start_step
        self.writer: SummaryWriter | None = None
        self._wandb: Any = None
        self._peak = device_peak(device, config.training.precision == "bf16")
        if enabled:
            # A process's share of a step, without what recomputation adds.
            flops = count_work(config).training_flops * self.batch_size / world_size
            self._step_flops = flops
            if config.output.wandb_project is not None:
                self._wandb = _start_wandb(folder, config)
        self.bar = tqdm(
            total=config.training.steps * self.batch_size,
            initial=start_step * self.batch_size,
            unit="image",
            unit_scale=True,
            desc="training",
            disable=not enabled,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Monitor:
        self._hook = threading.excepthook
        threading.excepthook = self._after_thread
        if self._enabled:
            with self._going_on_without_log():
                # Scalars of steps that a killed run made after its last checkpoint are made again.
                self.writer = SummaryWriter(str(self._folder), purge_step=self._start_step + 1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.writer is not None:
            with self._going_on_without_log():
                self.writer.close()
        threading.excepthook = self._hook
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))

    def step(self) -> None:
        """One optimizer step is done."""
        self.bar.update(self.batch_size)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log figures at a step (1-based) and show the loss in the bar.

        From "speed/steps_per_second" follow images/s, and for each device TFLOP/s and, where its
        peak is known, MFU.
        """
        if not self._enabled:
            return
        values = dict(values)
        rate = values.pop("speed/steps_per_second")
        flops = self._step_flops * rate
        values["speed/images_per_second"] = rate * self.batch_size
        values["speed/teraflops_per_second"] = flops / 1e12
        if self._peak is not None:
            values["speed/mfu"] = flops / self._peak
        memory = _peak_memory(self.device)
        if memory is not None:
            values["memory/peak_gib"] = memory / 2**30
        if self.writer is not None:
            with self._going_on_without_log():
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
        self.bar.set_postfix(loss=f"{values['loss/total']:.4f}", refresh=False)

    def images(self, step: int, grid: Tensor) -> None:
        """Show a grid of samples, uint8 (H, W, 3)."""
        if self.writer is not None:
            with self._going_on_without_log():
                self.writer.add_image("samples", grid, step, dataformats="HWC")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self.bar.write(line)

    @contextmanager
    def _going_on_without_log(self) -> Iterator[None]:
        """A log that cannot be written, on a full disk say, must not end the run."""
        try:
            yield
        except OSError as error:
            self.writer = None
            self.say(f"TensorBoard's log cannot be written ({error.strerror}): going on without")

    def _after_thread(self, failure: threading.ExceptHookArgs) -> None:
        # The next call of TensorBoard raises what its thread could not write.
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._hook(failure)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU what torch took at most, else what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    # In KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _start_wandb(folder: Path, config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "output.wandb_project is set and wandb is not installed: pip install "
            "'deco-fast[train]', or leave it out"
        ) from error
    # It lets a resumed run go on in the same place; folders of two runs may have one name.
    identity = folder / "wandb_id"
    if not identity.exists():
        write_atomically(identity, f"{folder.resolve().name}-{secrets.token_hex(4)}\n")
    # It takes what TensorBoard is given.
    return wandb.init(
        project=config.output.wandb_project,
        name=config.name,
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(folder),
        config=config.model_dump(mode="json"),
        sync_tensorboard=True,
    )
