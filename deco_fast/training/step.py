"""One training step: gradients of the objective, AdamW, the moving average."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deco_fast.config import RunConfig
from deco_fast.data.loader import Batch
from deco_fast.errors import UserError
from deco_fast.models.deco import DeCo
from deco_fast.training.distributed import Processes
from deco_fast.training.draws import draw_step
from deco_fast.training.ema import ExponentialMovingAverage
from deco_fast.training.objective import Objective

if TYPE_CHECKING:
    from deco_fast.alignment.dinov2 import DINOv2


class TrainingStep:
    """All that a step changes, and how.

    Args:
        config: the run.
        processes: this process among those of the run.
        encoder: the frozen encoder of a run with REPA, from `open_encoder`.

    Attributes:
        model: the network.
        objective: what is minimised; its parameters are the optimizer's.
        ema: the average of the network's weights.
        optimizer: AdamW.

    Raises:
        UserError: the batch cannot be shared evenly.
    """

    def __init__(
        self, config: RunConfig, processes: Processes, encoder: DINOv2 | None = None
    ) -> None:
        training = config.training
        self.config, self.processes = config, processes
        self.device = processes.device
        self.micro_batch_size = _micro_batch_size(config, processes)
        torch.manual_seed(training.seed)
        self.model = DeCo(config.model, config.card()).to(self.device)
        self.encoder = encoder
        feature_size = None if encoder is None else encoder.feature_size
        self.objective = Objective(self.model, config, feature_size).to(self.device)
        self.ema = ExponentialMovingAverage(self.model, training.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.objective.parameters(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.network: nn.Module = self.objective

    def prepare(self) -> None:
        """Wrap the objective for several processes and compile it; once, before the first step."""
        if self.processes.world_size > 1:
            cuda = self.device.type == "cuda"
            self.network = DistributedDataParallel(
                self.objective, [self.device] if cuda else None, broadcast_buffers=False
            )
        if self.config.training.compile:
            self.network.compile()
            if self.encoder is not None:
                self.encoder.compile()

    def __call__(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Make a step.

        Args:
            step: 0-based.
            batch: this process's share of the step's batch.

        Returns:
            The losses of this process's share, detached scalars on the device.
        """
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        parts = training.gradient_accumulation
        size = self.micro_batch_size
        means: dict[str, Tensor] = {}
        for part in range(parts):
            own = slice(part * size, (part + 1) * size)
            with self._no_sync(unless=part == parts - 1):
                losses = self._losses(step, batch, own)
                (losses["total"] / parts).backward()
            for name, value in losses.items():
                mean = value.detach() / parts
                means[name] = means[name] + mean if name in means else mean
        if training.gradient_clipping is not None:
            nn.utils.clip_grad_norm_(self.objective.parameters(), training.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return means

    def _losses(self, step: int, batch: Batch, own: slice) -> dict[str, Tensor]:
        """The losses of a part of this process's share."""
        x = batch.images[own].to(self.device, non_blocking=True)
        labels = batch.labels[own].to(self.device, non_blocking=True)
        first = self.processes.rank * len(batch.labels) + own.start
        places = range(first, first + len(labels))
        y, t, noise = draw_step(self.config, step, places, labels, self.device)
        features = None if self.encoder is None else self.encoder(x)
        losses: dict[str, Tensor] = self.network(x, y, t, noise, features)
        return losses

    def _no_sync(self, unless: bool) -> AbstractContextManager[Any]:
        if isinstance(self.network, DistributedDataParallel) and not unless:
            return self.network.no_sync()
        return nullcontext()


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
