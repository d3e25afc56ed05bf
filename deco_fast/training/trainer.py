"""The training loop: flow matching with the frequency-aware loss (paper section 3).

Every batch of step k and every random number in it depend on (seed, k) alone: a run that stopped
anywhere goes on exactly as if it had not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deco_fast.alignment import load_encoder
from deco_fast.config import RunConfig
from deco_fast.errors import UserError
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import save_grid
from deco_fast.sampling.run import draw, labels_for
from deco_fast.training import state
from deco_fast.training.batches import Batches, open_dataset
from deco_fast.training.distributed import Processes
from deco_fast.training.interrupt import Interrupt, catch_interrupt
from deco_fast.training.monitor import Monitor
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.step import TrainingStep

if TYPE_CHECKING:
    from deco_fast.alignment.dinov2 import DINOv2


class Trainer:
    """One run of a configuration in a folder, from its newest checkpoint if there is one.

    Args:
        config: the run.
        folder: the run's folder, opened.
        processes: this process among those of the run.

    Attributes:
        step: steps made.
        training: the network, its average, the optimizer.

    Raises:
        UserError: data or batch size cannot be used.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, processes: Processes) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        self.step = 0
        self.dataset = open_dataset(config, processes)
        self._loader_state: dict[str, Any] | None = None
        self.training = TrainingStep(config, processes, _open_encoder(config, processes.device))

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the folder; False where there is none."""
        saved = state.resume(self.training, self.folder)
        if saved is None:
            return False
        self.step = saved["step"]
        self._loader_state = saved["loader"]
        return True

    def batches(self) -> Batches:
        """The batches from the present step on."""
        return Batches(self.dataset, self.config, self.processes, self.step, self._loader_state)

    def run(self) -> Interrupt:
        """Train to the configured step, or until a signal asks to stop; both end in a checkpoint.

        Raises:
            UserError: the loss is not finite, or a checkpoint cannot be written.
        """
        config, output = self.config, self.config.output
        self.training.prepare()
        batches = self.batches()
        totals: dict[str, Tensor] = {}
        monitor = Monitor(
            self.folder.path,
            steps=config.training.steps,
            start_step=self.step,
            batch_size=config.training.batch_size,
            enabled=self.processes.is_main,
        )
        with monitor, catch_interrupt() as interrupt:
            while self.step < config.training.steps:
                losses = self.training(self.step, next(batches))
                totals = {name: totals.get(name, 0) + value for name, value in losses.items()}
                self.step += 1
                monitor.step()
                if self.step % output.log_every == 0 or self.step == config.training.steps:
                    since = (self.step - 1) % output.log_every + 1
                    self._log(monitor, {name: value / since for name, value in totals.items()})
                    totals = {}
                stopping = self.processes.any(bool(interrupt))
                last = self.step == config.training.steps
                if self.step % output.sample_every == 0 or last:
                    self._save_samples(monitor)
                if self.step % output.checkpoint_every == 0 or last or stopping:
                    state.save(self.training, self.folder, self.step, batches.state_dict(self.step))
                    self._list_damaged()
                if stopping:
                    break
        if self.processes.is_main:
            self._report_damaged()
            if self.step == config.training.steps:
                self.folder.mark_finished()
        self.processes.barrier()
        return interrupt

    def _log(self, monitor: Monitor, losses: dict[str, Tensor]) -> None:
        means = self.processes.mean(torch.stack(list(losses.values()))).tolist()
        values = dict(zip(losses, means, strict=True))
        if not math.isfinite(values["total"]):
            newest = self.folder.newest_checkpoint()
            raise UserError(
                f"the loss is {values['total']} at step {self.step}: lower "
                "training.learning_rate, or set training.gradient_clipping 1.0; "
                f"the newest checkpoint is {newest or 'none'}"
            )
        scalars = {f"loss/{name}": value for name, value in values.items()}
        scalars["learning_rate"] = self.training.optimizer.param_groups[0]["lr"]
        monitor.scalars(self.step, scalars)

    def _save_samples(self, monitor: Monitor) -> None:
        """A grid of the averaged model's images, always of the same noise and classes."""
        if not self.processes.is_main:
            return
        labels = labels_for(self.config.output.sample_count, self.config.model.num_classes)
        batches = draw(
            SamplingEngine(self.training.ema.model), labels, seed=self.config.training.seed
        )
        images = torch.cat([images for _, images in batches])
        path = self.folder.path / "samples" / f"step-{self.step:08d}.png"
        save_grid(images, path)
        monitor.say(f"samples: {path}")

    def _list_damaged(self) -> None:
        """Name in the run's folder what every process has found damaged."""
        if self.processes.is_main and self.dataset.damage is not None:
            self.folder.list_damaged(self.dataset.damage.names())

    def _report_damaged(self) -> None:
        if self.dataset.damage is not None and (names := self.dataset.damage.names()):
            print(f"{len(names)} damaged images were skipped, {names[0]} first: see damaged.txt")


def _open_encoder(config: RunConfig, device: torch.device) -> DINOv2 | None:
    """The frozen encoder of a run with REPA."""
    if not config.alignment.enabled:
        return None
    encoder = load_encoder(
        config.alignment.encoder, config.model.patch_size, config.training.precision
    )
    return encoder.to(device)
