"""What a run would cost: parameters, FLOPs, memory. Nothing is allocated or computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deco_fast import ops
from deco_fast.conditioning.qwen3 import QWEN3_PARAMETERS, qwen3_flops
from deco_fast.config import RunConfig
from deco_fast.models.build import build_network
from deco_fast.models.config import DeCoT2IConfig
from deco_fast.training.objective import Objective


class _VisionTransformer(NamedTuple):
    """The frozen encoder's shape: transformers need not be installed to count it."""

    width: int
    depth: int
    patch_size: int

    def flops(self, patches: int) -> int:
        """Of a forward pass over so many patches and a class token."""
        tokens = patches + 1
        products = (
            tokens * 12 * self.width**2
        )  # q, k, v, output, and an MLP of four times the width
        attention = 2 * tokens**2 * self.width
        embedding = patches * 3 * self.patch_size**2 * self.width
        return 2 * (self.depth * (products + attention) + embedding)


_DINOV2_B = _VisionTransformer(width=768, depth=12, patch_size=14)


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        parameters: of the whole network.
        decoder_parameters: of the pixel decoder alone.
        forward_flops: of one forward pass, per image.
        training_flops: of forward and backward, with REPA's projector and the frozen encoders, per
            image.
        state_bytes: weights, gradients, AdamW's two moments and the averaged weights in float32,
            and what autocast copies of them; of a text model Qwen3-1.7B in bf16.
        activation_bytes: kept for the backward pass, per image.
        projector_parameters: of REPA's projector, which is trained beside the network.
        encoder_flops: of REPA's frozen encoder, counted as DINOv2-B, per image; 0 with a cache.
        text_flops: of a text model's frozen text encoder, counted as Qwen3-1.7B, per image.
    """

    parameters: int
    decoder_parameters: int
    forward_flops: int
    training_flops: int
    state_bytes: int
    activation_bytes: int
    projector_parameters: int
    encoder_flops: int
    text_flops: int

    def describe(self, batch_size: int) -> str:
        """The figures for people, at a batch size per process and backward pass."""
        memory = self.state_bytes + batch_size * self.activation_bytes
        decoder = f"(pixel decoder {self.decoder_parameters:,})"
        lines = []
        if self.projector_parameters:
            lines = [
                f"REPA                of them {self.encoder_flops / 1e9:,.2f} G in DINOv2-B; "
                f"projector {self.projector_parameters:,} parameters"
            ]
        if self.text_flops:
            lines.append(
                f"text                of them {self.text_flops / 1e9:,.2f} G in Qwen3-1.7B"
            )
        return "\n".join(
            [
                f"parameters          {self.parameters:,} {decoder}",
                f"FLOPs per image     {self.forward_flops / 1e9:,.2f} G forward, "
                f"{self.training_flops / 1e9:,.2f} G forward and backward",
                *lines,
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
        model = build_network(config.model)
        feature_size = _DINOV2_B.width if config.alignment.enabled else None
        objective = Objective(model, config, feature_size)
        once, twice = (_step(objective, config, batch_size) for batch_size in (1, 2))
    per_image = twice.kept - once.kept
    projector = objective.projector
    projector_parameters = sum(p.numel() for p in projector.parameters()) if projector else 0
    # From a cache its features are read.
    computed = projector is not None and config.alignment.cache is None
    encoder_flops = _DINOV2_B.flops(_tokens(config)) if computed else 0
    text_flops, text_bytes = 0, 0
    if isinstance(config.model, DeCoT2IConfig):
        text_flops, text_bytes = qwen3_flops(config.model.text_length), 2 * QWEN3_PARAMETERS
    parameters = sum(p.numel() for p in model.parameters())
    return Estimate(
        parameters=parameters,
        decoder_parameters=sum(p.numel() for p in model.decoder.parameters()),
        forward_flops=once.forward_flops - once.projector_flops,
        training_flops=once.forward_flops + once.backward_flops + encoder_flops + text_flops,
        # What does not grow with the batch: autocast's bf16 copies of the weights.
        state_bytes=20 * parameters
        + 16 * projector_parameters
        + once.kept
        - per_image
        + text_bytes,
        activation_bytes=per_image,
        projector_parameters=projector_parameters,
        encoder_flops=encoder_flops,
        text_flops=text_flops,
    )


def _tokens(config: RunConfig) -> int:
    return config.data.height * config.data.width // config.model.patch_size**2


class _Step(NamedTuple):
    """FLOPs of forward (with the projector's), of the projector and of backward; bytes kept."""

    forward_flops: int
    projector_flops: int
    backward_flops: int
    kept: int


def _step(objective: Objective, config: RunConfig, batch_size: int) -> _Step:
    """Count a forward and a backward pass."""
    shape = (batch_size, config.model.in_channels, config.data.height, config.data.width)
    x = torch.randn(shape)
    t, y = torch.zeros(batch_size), torch.zeros(batch_size, dtype=torch.int64)
    if isinstance(config.model, DeCoT2IConfig):
        y = torch.zeros(batch_size, config.model.text_length, config.model.text_size)
    features = torch.randn(batch_size, _tokens(config), _DINOV2_B.width)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # By identity, as several nodes may keep one tensor and a fake tensor has no address.
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    weights = {id(p.untyped_storage()) for p in objective.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as forward, hooks:
        total = objective(x, y, t, torch.zeros_like(x), features)["total"]
    with FlopCounterMode(display=False) as backward:
        total.backward()
    nbytes = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    projector = forward.get_flop_counts().get("Objective.projector", {})
    return _Step(
        forward.get_total_flops(), sum(projector.values()), backward.get_total_flops(), nbytes
    )
