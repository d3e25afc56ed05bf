"""What a training step minimises (specification B.7)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from deco_fast.alignment import Projector, alignment_loss
from deco_fast.config import RunConfig
from deco_fast.flow import interpolate, timestep_weight
from deco_fast.losses import flow_matching_loss, frequency_table
from deco_fast.models.network import DeCoNetwork


class Objective(nn.Module):
    """The losses of a batch; its parameters are all that is trained.

    One module, so that DDP reduces, FSDP2 shards and torch.compile sees the whole step's forward.

    Args:
        model: the network to train, on its device.
        config: the run.
        feature_size: channels of the frozen encoder's features, where the run has REPA.

    Attributes:
        projector: what REPA trains beside the network; None without it.
    """

    def __init__(
        self, model: DeCoNetwork, config: RunConfig, feature_size: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.projector: Projector | None = None
        if feature_size is not None:
            width = config.model.hidden_size
            hidden_size = config.alignment.projector_hidden_size or width
            self.projector = Projector(width, hidden_size, feature_size)
        self.aligned_layer = config.alignment.layer
        self.alignment_weight = config.alignment.weight
        loss = config.loss
        self.frequency_weight = loss.frequency_weight
        self.timestep_weight = config.flow.timestep_weight
        self.bf16 = config.training.precision == "bf16"
        # Not a buffer: DDP would send it round before every step.
        self.table = frequency_table(loss.quality, loss.mode, loss.gamma).to(
            model.patch_embedder.weight.device
        )

    def forward(
        self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor, features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The network in the run's precision, everything else in float32.

        Args:
            x: images (B, C, H, W) in [−1, 1].
            y: conditions (B, …): labels, the null class where dropped; or text features.
            t: times (B,) in [0, 1].
            noise: (B, C, H, W), standard normal.
            features: (B, N, feature_size) of the images, from the frozen encoder, for REPA.

        Returns:
            Scalars: "total", which is differentiable, then detached its terms.
        """
        noisy = interpolate(x, noise, t)
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            if self.projector is None:
                prediction = self.model(noisy, t, y)
            else:
                layers = (self.aligned_layer,)
                tokens, (hidden,) = self.model.encode(noisy, t, y, return_layers=layers)
                prediction = self.model.to_velocity(self.model.decode(noisy, tokens), noisy, t)
                projected = self.projector(hidden)
        weight = None
        if self.timestep_weight != "constant":
            weight = timestep_weight(self.timestep_weight, t)
        total, flow_matching, frequency = flow_matching_loss(
            prediction,
            self.model.target(x, noise, noisy, t),
            self.table,
            self.frequency_weight,
            weight,
        )
        losses = {"total": total, "flow_matching": flow_matching, "frequency": frequency}
        if self.projector is not None:
            assert features is not None, "REPA needs the encoder's features"
            alignment = alignment_loss(projected, features)
            losses["total"] = total + self.alignment_weight * alignment
            losses["alignment"] = alignment.detach()
        return losses
