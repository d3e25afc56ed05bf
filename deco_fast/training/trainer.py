"""The training loop: flow matching with the frequency-aware loss (paper section 3).

Every random number of step k comes from a generator seeded by (seed, k, rank), and every batch
from (seed, k): a run that stopped anywhere goes on exactly as if it had not.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from deco_fast.checkpoint import load_training_state, load_weights, save_checkpoint
from deco_fast.conditioning.labels import drop_labels
from deco_fast.config import RunConfig
from deco_fast.data.digits import DigitsDataset
from deco_fast.data.folder import FolderDataset
from deco_fast.data.order import EpochBatches
from deco_fast.errors import UserError
from deco_fast.flow import interpolate, sample_timesteps, timestep_weight, velocity
from deco_fast.losses import flow_matching_loss, frequency_table
from deco_fast.models.deco import DeCo
from deco_fast.sampling.images import save_grid
from deco_fast.sampling.run import draw, labels_for
from deco_fast.training.distributed import Processes
from deco_fast.training.ema import ExponentialMovingAverage
from deco_fast.training.interrupt import Interrupt, catch_interrupt
from deco_fast.training.monitor import Monitor
from deco_fast.training.run_folder import RunFolder


class Trainer:
    """One run of a configuration in a folder, from its newest checkpoint if there is one.

    Args:
        config: the run.
        folder: the run's folder, opened.
        processes: this process among those of the run.

    Raises:
        UserError: data or batch size cannot be used.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, processes: Processes) -> None:
        training = config.training
        self.config, self.folder, self.processes = config, folder, processes
        self.device = processes.device
        self.step = 0
        self.micro_batch_size = _micro_batch_size(config, processes)
        self.dataset = _dataset(config)
        torch.manual_seed(training.seed)
        self.model = DeCo(config.model, config.card()).to(self.device)
        self.ema = ExponentialMovingAverage(self.model, training.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.table = frequency_table(config.loss.quality, config.loss.mode, config.loss.gamma).to(
            self.device
        )

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the folder; False where there is none."""
        checkpoint = self.folder.newest_checkpoint()
        if checkpoint is None:
            return False
        load_weights(checkpoint / "model.safetensors", self.model)
        load_weights(checkpoint / "ema.safetensors", self.ema.model)
        state = load_training_state(checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["random"]["torch"])
        return True

    def run(self) -> Interrupt:
        """Train to the configured step, or until a signal asks to stop; both end in a checkpoint.

        Raises:
            UserError: the loss is not finite, or a checkpoint cannot be written.
        """
        config, output = self.config, self.config.output
        network = self._compiled_network()
        batches = self._batches()
        totals = torch.zeros(3, device=self.device)
        monitor = Monitor(
            self.folder.path,
            steps=config.training.steps,
            start_step=self.step,
            batch_size=config.training.batch_size,
            enabled=self.processes.is_main,
        )
        with monitor, catch_interrupt() as interrupt:
            while self.step < config.training.steps:
                totals += self._optimizer_step(network, _next(batches))
                self.step += 1
                monitor.step()
                if self.step % output.log_every == 0 or self.step == config.training.steps:
                    since = (self.step - 1) % output.log_every + 1
                    self._log(monitor, totals / since)
                    totals.zero_()
                stopping = self.processes.any(bool(interrupt))
                last = self.step == config.training.steps
                if self.step % output.sample_every == 0 or last:
                    self._save_samples(monitor)
                if self.step % output.checkpoint_every == 0 or last or stopping:
                    self._save_checkpoint()
                if stopping:
                    break
        if self.processes.is_main:
            self._report_unreadable()
            if self.step == config.training.steps:
                self.folder.mark_finished()
        self.processes.barrier()
        return interrupt

    def _optimizer_step(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Forward, loss, backward and update; the step's (total, flow matching, frequency)."""
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        generator = self._generator()
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        accumulation = training.gradient_accumulation
        terms = torch.zeros(3, device=self.device)
        for i, (x, y) in enumerate(
            zip(images.chunk(accumulation), labels.chunk(accumulation), strict=True)
        ):
            with self._no_sync(network, unless=i == accumulation - 1):
                loss = self._losses(network, x, y, generator)
                (loss[0] / accumulation).backward()
            terms += torch.stack(loss).detach() / accumulation
        if training.gradient_clipping is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return terms

    def _losses(
        self, network: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        flow, loss = self.config.flow, self.config.loss
        y = drop_labels(y, self.config.model.num_classes, flow.null_probability, generator)
        t = sample_timesteps(
            len(x),
            distribution=flow.distribution,
            time_shift=flow.time_shift,
            generator=generator,
            device=self.device,
        )
        noise = torch.randn(x.shape, generator=generator, device=self.device)
        with torch.autocast(
            self.device.type, torch.bfloat16, self.config.training.precision == "bf16"
        ):
            prediction = network(interpolate(x, noise, t), t, y)
        weight = None
        if flow.timestep_weight != "constant":
            weight = timestep_weight(flow.timestep_weight, t)
        return flow_matching_loss(
            prediction, velocity(x, noise), self.table, loss.frequency_weight, weight
        )

    def _generator(self) -> torch.Generator:
        """The source of this step's random numbers in this process."""
        sequence = np.random.SeedSequence(
            self.config.training.seed, spawn_key=(self.step, self.processes.rank)
        )
        seed = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.device).manual_seed(seed)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = EpochBatches(
            len(self.dataset),
            self.config.training.batch_size,
            self.config.training.seed,
            self.processes.rank,
            self.processes.world_size,
            self.step,
        )
        workers = self.config.data.workers
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=order,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                persistent_workers=workers > 0,
                worker_init_fn=_ignore_interrupt,
            )
        )

    def _compiled_network(self) -> nn.Module:
        network: nn.Module = self.model
        if self.processes.world_size > 1:
            cuda = self.device.type == "cuda"
            network = DistributedDataParallel(network, [self.device] if cuda else None)
        if self.config.training.compile:
            network.compile()
        return network

    def _no_sync(self, network: nn.Module, unless: bool) -> AbstractContextManager[Any]:
        if isinstance(network, DistributedDataParallel) and not unless:
            return network.no_sync()
        return nullcontext()

    def _log(self, monitor: Monitor, terms: Tensor) -> None:
        total, flow_matching, frequency = self.processes.mean(terms).tolist()
        if not math.isfinite(total):
            newest = self.folder.newest_checkpoint()
            raise UserError(
                f"the loss is {total} at step {self.step}: lower training.learning_rate, or set "
                f"training.gradient_clipping 1.0; the newest checkpoint is {newest or 'none'}"
            )
        monitor.scalars(
            self.step,
            {
                "loss/total": total,
                "loss/flow_matching": flow_matching,
                "loss/frequency": frequency,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
            },
        )

    def _save_samples(self, monitor: Monitor) -> None:
        """A grid of the averaged model's images, always of the same noise and classes."""
        if not self.processes.is_main:
            return
        labels = labels_for(self.config.output.sample_count, self.config.model.num_classes)
        batches = draw(self.ema.model, labels, seed=self.config.training.seed)
        images = torch.cat([images for _, images in batches])
        path = self.folder.path / "samples" / f"step-{self.step:08d}.png"
        save_grid(images, path)
        monitor.say(f"samples: {path}")

    def _report_unreadable(self) -> None:
        if isinstance(self.dataset, FolderDataset) and (files := self.dataset.unreadable()):
            print(f"{len(files)} unreadable images were skipped, {files[0]} first")

    def _save_checkpoint(self) -> None:
        if self.processes.is_main:
            save_checkpoint(
                self.folder.checkpoint(self.step),
                model=self.model,
                ema=self.ema.model,
                card=self.config.card(self.step),
                training={
                    "step": self.step,
                    "optimizer": self.optimizer.state_dict(),
                    "loader": {"step": self.step, "seed": self.config.training.seed},
                    "random": {"torch": torch.get_rng_state()},
                    "world_size": self.processes.world_size,
                },
            )
            self.folder.drop_old_checkpoints(self.config.output.keep_checkpoints)
        self.processes.barrier()


def _next(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    try:
        return next(batches)
    except UserError as error:
        # From a loader's worker the message comes wrapped in that worker's traceback.
        raise UserError(str(error).rsplit("UserError: ", 1)[-1]) from error


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal: loaders must live until the main process
    # has saved and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of the 0-based step: linear warm-up, then constant or a cosine to 0."""
    training = config.training
    warmup = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    if training.schedule == "constant":
        return training.learning_rate * warmup
    done = max(0, step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * warmup * (1 + math.cos(math.pi * done)) / 2


def _micro_batch_size(config: RunConfig, processes: Processes) -> int:
    parts = processes.world_size * config.training.gradient_accumulation
    size, rest = divmod(config.training.batch_size, parts)
    if rest or not size:
        raise UserError(
            f"training.batch_size {config.training.batch_size} is not a multiple of "
            f"{processes.world_size} processes × {config.training.gradient_accumulation} "
            "backward passes per step: change training.batch_size"
        )
    return size


def _dataset(config: RunConfig) -> DigitsDataset | FolderDataset:
    data = config.data
    if data.dataset == "digits":
        return DigitsDataset("train", data.height)
    if data.root is None:
        raise UserError("data.root is not set: give the folder of class folders by --data.root")
    dataset = FolderDataset(data.root, data.height, data.width, random_flip=data.random_flip)
    if len(dataset.classes) != config.model.num_classes:
        raise UserError(
            f"{data.root} has {len(dataset.classes)} class folders: "
            f"set --model.num_classes {len(dataset.classes)} (it is {config.model.num_classes})"
        )
    return dataset
