"""What a run would cost: parameters, FLOPs, memory. Nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deco_fast import ops
from deco_fast.conditioning.qwen3 import QWEN3_PARAMETERS
from deco_fast.config import RunConfig
from deco_fast.models.build import build_network
from deco_fast.models.config import DeCoT2IConfig
from deco_fast.training.objective import Objective
from deco_fast.training.work import Work, count_work, empty_inputs, feature_size


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        work: what it computes.
        state_bytes: weights, gradients, AdamW's two moments and the averaged weights in float32,
            and what autocast copies of them; of a text model Qwen3-1.7B in bf16.
        activation_bytes: kept for the backward pass, per image.
    """

    work: Work
    state_bytes: int
    activation_bytes: int

    def describe(self, batch_size: int) -> str:
        """The figures for people, at a batch size per process and backward pass."""
        work = self.work
        memory = self.state_bytes + batch_size * self.activation_bytes
        decoder = f"(pixel decoder {work.decoder_parameters:,})"
        lines = []
        if work.projector_parameters:
            lines = [
                f"REPA                of them {work.encoder_flops / 1e9:,.2f} G in DINOv2-B; "
                f"projector {work.projector_parameters:,} parameters"
            ]
        if work.text_flops:
            lines.append(
                f"text                of them {work.text_flops / 1e9:,.2f} G in Qwen3-1.7B"
            )
        return "\n".join(
            [
                f"parameters          {work.parameters:,} {decoder}",
                f"FLOPs per image     {work.forward_flops / 1e9:,.2f} G forward, "
                f"{work.training_flops / 1e9:,.2f} G forward and backward",
                *lines,
                f"memory, estimated   {memory / 2**30:,.2f} GiB: {self.state_bytes / 2**30:,.2f} "
                f"for weights, gradients, optimizer and EMA, {batch_size} × "
                f"{self.activation_bytes / 2**20:,.1f} MiB of activations",
            ]
        )


def estimate(config: RunConfig) -> Estimate:
    """Count the work, and on fake tensors what is kept, in the precision of the run.

    That is for the reference ops in eager mode; the fused ones keep less.
    """
    # Imports torch's compiler, which other commands do without.
    from deco_fast.training.parallel import recompute_activations

    work = count_work(config)
    with FakeTensorMode(), ops.use_backend("reference"):
        network = build_network(config.model)
        if config.training.recompute_activations:
            recompute_activations(network)
        objective = Objective(network, config, feature_size(config))
        once, twice = (_kept(objective, config, batch_size) for batch_size in (1, 2))
    text_bytes = 2 * QWEN3_PARAMETERS if isinstance(config.model, DeCoT2IConfig) else 0
    per_image = twice - once
    return Estimate(
        work=work,
        # What does not grow with the batch: autocast's bf16 copies of the weights.
        state_bytes=20 * work.parameters
        + 16 * work.projector_parameters
        + once
        - per_image
        + text_bytes,
        activation_bytes=per_image,
    )


def _kept(objective: Objective, config: RunConfig, batch_size: int) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside the weights."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # By identity, as several nodes may keep one tensor and a fake tensor has no address.
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    weights = {id(p.untyped_storage()) for p in objective.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(*empty_inputs(config, batch_size))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
