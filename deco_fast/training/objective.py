"""What a training step minimises (specification B.7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deco_fast.config import RunConfig
from deco_fast.flow import interpolate, timestep_weight, velocity
from deco_fast.losses import flow_matching_loss, frequency_table
from deco_fast.models.deco import DeCo


class Objective(nn.Module):
    """The losses of a batch; its parameters are all that is trained.

    One module, so that DDP reduces, FSDP2 shards and torch.compile sees the whole step's forward.

    Args:
        model: the network to train.
        config: the run.
    """

    table: Tensor

    def __init__(self, model: DeCo, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        loss = config.loss
        self.register_buffer(
            "table", frequency_table(loss.quality, loss.mode, loss.gamma), persistent=False
        )

    def forward(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The network in the run's precision, everything else in float32.

        Args:
            x: images (B, C, H, W) in [−1, 1].
            y: labels (B,), the null class where dropped.
            t: times (B,) in [0, 1].
            noise: (B, C, H, W), standard normal.

        Returns:
            Scalars: "total", which is differentiable, then detached its terms.
        """
        bf16 = self.config.training.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            prediction = self.model(interpolate(x, noise, t), t, y)
        name = self.config.flow.timestep_weight
        total, flow_matching, frequency = flow_matching_loss(
            prediction,
            velocity(x, noise),
            self.table,
            self.config.loss.frequency_weight,
            None if name == "constant" else timestep_weight(name, t),
        )
        return {"total": total, "flow_matching": flow_matching, "frequency": frequency}
