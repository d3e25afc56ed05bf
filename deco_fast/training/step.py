"""One training step: gradients of the objective, AdamW, the moving average."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deco_fast.alignment.features import Features
from deco_fast.conditioning.qwen3 import EncodeText
from deco_fast.config import RunConfig
from deco_fast.data.loader import Batch
from deco_fast.errors import UserError
from deco_fast.models.build import build_network
from deco_fast.training import parallel
from deco_fast.training.captured import CapturedBackward, can_capture
from deco_fast.training.distributed import Processes
from deco_fast.training.draws import Draws, draw_step
from deco_fast.training.ema import ExponentialMovingAverage
from deco_fast.training.guard import LossGuard
from deco_fast.training.objective import Objective


class StepFigures(NamedTuple):
    """What a step has to say, the same in all processes.

    Attributes:
        names: "loss/total" and its terms, "gradient_norm" before clipping, "tripped" (1 where
            the guard has stopped the run).
        values: in that order, float32 on the device, which need not have computed them yet.
    """

    names: tuple[str, ...]
    values: Tensor

    @property
    def by_name(self) -> dict[str, Tensor]:
        """Each as a scalar."""
        return dict(zip(self.names, self.values, strict=True))


class TrainingStep:
    """All that a step changes, and how.

    Args:
        config: the run.
        processes: this process among those of the run.
        features: the targets of a run with REPA.
        encode_text: the text encoder of a text model.

    Attributes:
        model: the network.
        objective: what is minimised; its parameters are the optimizer's.
        ema: the average of the network's weights.
        optimizer: AdamW.
        is_sharded: whether each process holds only a part of them.

    Raises:
        UserError: the batch cannot be shared evenly.
    """

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        features: Features | None = None,
        encode_text: EncodeText | None = None,
    ) -> None:
        training = config.training
        self.config, self.processes = config, processes
        self.device = processes.device
        self.micro_batch_size = micro_batch_size(config, processes.world_size)
        torch.manual_seed(training.seed)
        self.model = build_network(config.model, config.card()).to(self.device)
        self.features = features
        self.encode_text = encode_text
        feature_size = None if features is None else features.channels
        self.objective = Objective(self.model, config, feature_size).to(self.device)
        self.ema = ExponentialMovingAverage(self.model, training.ema_decay)
        if training.recompute_activations:
            parallel.recompute_activations(self.model)
        self.is_sharded = training.distribution == "fsdp" and processes.world_size > 1
        if self.is_sharded:
            mesh = parallel.device_mesh(processes)
            parallel.shard(self.model, mesh, self.objective)
            parallel.shard(self.ema.model, mesh)
        # Listing them anew would take the host half a millisecond each time.
        self._parameters = list(self.objective.parameters())
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.guard = LossGuard(self.optimizer, training.explosion_factor, self.device)
        self.network: nn.Module = self.objective
        self.captured: CapturedBackward | None = None

    def prepare(self) -> None:
        """Wrap the objective for several processes, compile it and see to its recording; once,
        before the first step."""
        training = self.config.training
        recorded = training.cuda_graph and can_capture(training, self.processes)
        self.network = parallel.prepare_network(
            self.objective, training, self.processes, recorded=recorded
        )
        if self.features is not None and training.compile:
            self.features.compile()
        if recorded:
            # As DDP does: processors of another kind may draw other bits from the same seed.
            self.processes.copy_from_main_([p.detach() for p in self._parameters])
            self.capture()

    def capture(self) -> None:
        """Have the next call record `network` as a CUDA graph, and those after it replay it."""
        parts = self.config.training.gradient_accumulation
        self.captured = CapturedBackward(self.network, self._parameters, parts)

    def __call__(self, step: int, batch: Batch) -> StepFigures:
        """Make a step.

        Args:
            step: 0-based.
            batch: this process's share of the step's batch.
        """
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        parts, size = training.gradient_accumulation, self.micro_batch_size
        sums: dict[str, Tensor] = {}
        for part in range(parts):
            own = slice(part * size, (part + 1) * size)
            x, draws = self._inputs(step, batch, own)
            y, t, noise = draws
            if not isinstance(y, Tensor):
                assert self.encode_text is not None, "a text model needs its text encoder"
                y = self.encode_text(y)
            features = None if self.features is None else self.features(x, batch.indices[own])
            inputs = (x, y, t, noise, features)
            if self.captured is not None:
                losses = self.captured(*inputs)
            else:
                with parallel.reduce_gradients(self.network, now=part == parts - 1):
                    losses = self.network(*inputs)
                    (losses["total"] / parts).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float()
        if self.captured is not None:
            self.processes.average_([p.grad for p in self._parameters if p.grad is not None])
        losses_over_all = self.processes.mean(torch.stack(list(sums.values())) / parts)
        norm = self._clip_gradients()
        self.guard.check(losses_over_all[0], norm)
        self.ema.wait()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return StepFigures(
            (*(f"loss/{name}" for name in sums), "gradient_norm", "tripped"),
            torch.cat([losses_over_all, torch.stack([norm, self.guard.tripped])]),
        )

    def close(self) -> None:
        """End what goes on beside the steps."""
        if self.features is not None:
            self.features.flush()

    def draws(self, step: int, batch: Batch) -> Draws:
        """The labels or captions, times and noise that a batch meets in a step."""
        return self._inputs(step, batch, slice(0, len(batch.labels)))[1]

    def _inputs(self, step: int, batch: Batch, own: slice) -> tuple[Tensor, Draws]:
        """Images on the device and the draws for a part of this process's share."""
        x = batch.images[own].to(self.device, non_blocking=True)
        labels = batch.labels[own]
        if isinstance(labels, Tensor):
            labels = labels.to(self.device, non_blocking=True)
        first = self.processes.rank * len(batch.labels) + own.start
        places = range(first, first + len(labels))
        return x, draw_step(self.config, step, places, labels, self.device)

    def _clip_gradients(self) -> Tensor:
        """The norm of the whole gradient before it was clipped."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        most = self.config.training.gradient_clipping
        if most is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, most, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of the 0-based step: linear warm-up, then constant or a cosine to 0."""
    training = config.training
    warmup = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    if training.schedule == "constant":
        return training.learning_rate * warmup
    done = max(0, step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * warmup * (1 + math.cos(math.pi * done)) / 2


def micro_batch_size(config: RunConfig, world_size: int = 1) -> int:
    """Images of a backward pass in each of so many processes.

    Raises:
        UserError: the batch cannot be shared evenly.
    """
    parts = world_size * config.training.gradient_accumulation
    size, rest = divmod(config.training.batch_size, parts)
    if rest or not size:
        raise UserError(
            f"training.batch_size {config.training.batch_size} is not a multiple of "
            f"{world_size} processes × {config.training.gradient_accumulation} "
            "backward passes per step: change training.batch_size"
        )
    return size
