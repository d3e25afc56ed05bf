"""What a run computes for an image: parameters and FLOPs, counted on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deco_fast import ops
from deco_fast.conditioning.qwen3 import qwen3_flops
from deco_fast.config import RunConfig
from deco_fast.models.build import empty_network
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
class Work:
    """The work of a run; FLOPs are those of products, attention's among them, per image.

    Attributes:
        parameters: of the whole network.
        decoder_parameters: of the pixel decoder alone.
        projector_parameters: of REPA's projector, which is trained beside the network.
        forward_flops: of one forward pass of the network.
        training_flops: of forward and backward, with REPA's projector and the frozen encoders.
        encoder_flops: of REPA's frozen encoder, counted as DINOv2-B; 0 with a cache.
        text_flops: of a text model's frozen text encoder, counted as Qwen3-1.7B.
    """

    parameters: int
    decoder_parameters: int
    projector_parameters: int
    forward_flops: int
    training_flops: int
    encoder_flops: int
    text_flops: int


def count_work(config: RunConfig) -> Work:
    """Count what a run computes, for the reference ops: a fused op's FLOPs cannot be seen."""
    # Products are the same in every precision, and autocast does not know the meta device.
    training = config.training.model_copy(update={"precision": "fp32"})
    config = config.model_copy(update={"training": training})
    # On the meta device attention is written out in products, which are counted; the kernels that
    # CPUs have for it are not.
    with torch.device("meta"), ops.use_backend("reference"):
        model = empty_network(config.model)
        objective = Objective(model, config, feature_size(config))
        inputs = empty_inputs(config, 1)
        with FlopCounterMode(display=False) as forward:
            total = objective(*inputs)["total"]
        with FlopCounterMode(display=False) as backward:
            total.backward()
    projector = objective.projector
    projector_flops = sum(forward.get_flop_counts().get("Objective.projector", {}).values())
    # From a cache its features are read.
    computed = projector is not None and config.alignment.cache is None
    encoder_flops = _DINOV2_B.flops(tokens_of(config)) if computed else 0
    text_flops = 0
    if isinstance(config.model, DeCoT2IConfig):
        text_flops = qwen3_flops(config.model.text_length)
    both = forward.get_total_flops() + backward.get_total_flops()
    return Work(
        parameters=sum(p.numel() for p in model.parameters()),
        decoder_parameters=sum(p.numel() for p in model.decoder.parameters()),
        projector_parameters=sum(p.numel() for p in projector.parameters()) if projector else 0,
        forward_flops=forward.get_total_flops() - projector_flops,
        training_flops=both + encoder_flops + text_flops,
        encoder_flops=encoder_flops,
        text_flops=text_flops,
    )


def feature_size(config: RunConfig) -> int | None:
    """Channels of REPA's features, of DINOv2-B; None without REPA."""
    return _DINOV2_B.width if config.alignment.enabled else None


def tokens_of(config: RunConfig) -> int:
    """Tokens of an image in the DiT."""
    return config.data.height * config.data.width // config.model.patch_size**2


def empty_inputs(config: RunConfig, batch_size: int) -> tuple[Tensor, ...]:
    """What `Objective` takes, on the default device, in values that nobody may look at.

    Returns:
        Images (B, C, H, W); labels (B,) or text features (B, T, S); times (B,); noise like the
        images; the encoder's features (B, L, 768).
    """
    x = torch.empty(batch_size, config.model.in_channels, config.data.height, config.data.width)
    t, y = torch.zeros(batch_size), torch.zeros(batch_size, dtype=torch.int64)
    if isinstance(config.model, DeCoT2IConfig):
        y = torch.zeros(batch_size, config.model.text_length, config.model.text_size)
    features = torch.empty(batch_size, tokens_of(config), _DINOV2_B.width)
    return x, y, t, torch.empty_like(x), features
