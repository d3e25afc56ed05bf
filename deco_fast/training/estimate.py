"""What a run would cost: parameters, FLOPs, memory. Nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deco_fast import ops
from deco_fast.config import RunConfig
from deco_fast.losses import flow_matching_loss, frequency_table
from deco_fast.models.deco import DeCo


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        parameters: of the whole network.
        decoder_parameters: of the pixel decoder alone.
        forward_flops: of one forward pass, per image.
        training_flops: of forward and backward, per image.
        state_bytes: weights, gradients, AdamW's two moments and the averaged weights in float32,
            and what autocast copies of them.
        activation_bytes: kept for the backward pass, per image.
    """

    parameters: int
    decoder_parameters: int
    forward_flops: int
    training_flops: int
    state_bytes: int
    activation_bytes: int

    def describe(self, batch_size: int) -> str:
        """The figures for people, at a batch size per process and backward pass."""
        memory = self.state_bytes + batch_size * self.activation_bytes
        decoder = f"(pixel decoder {self.decoder_parameters:,})"
        return "\n".join(
            [
                f"parameters          {self.parameters:,} {decoder}",
                f"FLOPs per image     {self.forward_flops / 1e9:,.2f} G forward, "
                f"{self.training_flops / 1e9:,.2f} G forward and backward",
                f"memory, estimated   {memory / 2**30:,.2f} GiB: {self.state_bytes / 2**30:,.2f} "
                f"for weights, gradients, optimizer and EMA, {batch_size} × "
                f"{self.activation_bytes / 2**20:,.1f} MiB of activations",
            ]
        )


def estimate(config: RunConfig) -> Estimate:
    """Count on fake tensors, in the precision of the run, for the reference ops in eager mode.

    A fused op's FLOPs cannot be seen from outside, and it keeps less.
    """
    with FakeTensorMode(), ops.use_backend("reference"):
        model = DeCo(config.model)
        forward_flops, backward_flops, kept = _step(model, config, batch_size=1)
        per_image = _step(model, config, batch_size=2)[2] - kept
    parameters = sum(p.numel() for p in model.parameters())
    return Estimate(
        parameters=parameters,
        decoder_parameters=sum(p.numel() for p in model.decoder.parameters()),
        forward_flops=forward_flops,
        training_flops=forward_flops + backward_flops,
        # What does not grow with the batch: autocast's bf16 copies of the weights.
        state_bytes=20 * parameters + kept - per_image,
        activation_bytes=per_image,
    )


def _step(model: DeCo, config: RunConfig, batch_size: int) -> tuple[int, int, int]:
    """FLOPs of forward and of backward, and the bytes kept between the two."""
    shape = (batch_size, config.model.in_channels, config.data.height, config.data.width)
    x = torch.randn(shape)
    t, y = torch.zeros(batch_size), torch.zeros(batch_size, dtype=torch.int64)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # By identity, as several nodes may keep one tensor and a fake tensor has no address.
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    weights = {id(p.untyped_storage()) for p in model.parameters()}
    autocast = torch.autocast("cpu", torch.bfloat16, config.training.precision == "bf16")
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as forward, autocast, hooks:
        velocity = model(x, t, y)
        loss, _, _ = flow_matching_loss(velocity, x, frequency_table(), 1.0)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    nbytes = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    return forward.get_total_flops(), backward.get_total_flops(), nbytes
