"""DINOv2's patch tokens, which REPA aligns the DiT with (specification B.11)."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

# By so much of a patch the original asks for a larger grid than it needs, which moves every
# point at which the position table is read.
_GRID_OFFSET = 0.1


class _Embeddings(Dinov2Embeddings):
    """transformers interpolates positions to the exact grid; the original does not quite."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        side = round((self.position_embeddings.shape[1] - 1) ** 0.5)
        patch = self.patch_embeddings.projection.kernel_size[0]
        rows, columns = height // patch, width // patch
        if rows == columns == side:
            return self.position_embeddings
        cls, table = self.position_embeddings.float().split((1, side * side), dim=1)
        table = F.interpolate(
            table.unflatten(1, (side, side)).permute(0, 3, 1, 2),
            scale_factor=((rows + _GRID_OFFSET) / side, (columns + _GRID_OFFSET) / side),
            mode="bicubic",
        )
        return torch.cat((cls, table.flatten(2).mT), dim=1)


class DINOv2(nn.Module):
    """The frozen encoder: images to patch tokens, one for each of DeCo's.

    Args:
        backbone: transformers' model, from `load_dinov2` or `random_dinov2`; it is changed.
        patch_size: DeCo's, in pixels; the image is resized so that as many of the backbone's
            patches lie on each side.
        precision: "bf16" computes as under autocast, with the products' weights kept in bf16;
            "fp32" throughout in float32.

    Attributes:
        feature_size: channels of a token; 768 for B/14.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: Dinov2Model, patch_size: int = 16, precision: str = "bf16"
    ) -> None:
        super().__init__()
        embeddings = _Embeddings(backbone.config)
        embeddings.load_state_dict(backbone.embeddings.state_dict())
        backbone.embeddings = embeddings
        self.backbone = backbone.requires_grad_(False).eval()
        self.patch_size = patch_size
        self.precision = precision
        self.feature_size: int = backbone.config.hidden_size
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)
        if precision == "bf16":
            # What autocast would round anew at every step; the rest it leaves in float32.
            for module in backbone.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.bfloat16()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights and of how images are read; what it says follows from it."""
        digest = hashlib.sha256(f"{self.patch_size} {self.precision}".encode())
        for name, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> DINOv2:
        """Frozen, the encoder stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised patch tokens without the class token.

        Args:
            images: (B, 3, H, W) in [−1, 1], as DeCo is trained on them.

        Returns:
            (B, H/p · W/p, feature_size) float32, rows first.
        """
        return self._tokens(images)[:, 1:]

    @torch.no_grad()
    def class_tokens(self, images: Tensor) -> Tensor:
        """The normalised class token (B, feature_size), float32, of images as in `forward`."""
        return self._tokens(images)[:, 0]

    def _tokens(self, images: Tensor) -> Tensor:
        patch = self.backbone.embeddings.patch_embeddings.projection.kernel_size[0]
        size = tuple(patch * side // self.patch_size for side in images.shape[-2:])
        pixels = ((images.float() + 1) / 2 - self.mean) / self.std
        pixels = F.interpolate(pixels, size=size, mode="bicubic")
        bf16 = self.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
            tokens = self.backbone(pixel_values=pixels).last_hidden_state
        return tokens.float()


def random_dinov2(seed: int = 0, config: Dinov2Config | None = None) -> Dinov2Model:
    """DINOv2 with random weights, for tests and benchmarks.

    Args:
        seed: of the weights.
        config: the network's shape; None is B/14 as published.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Dinov2Model(config or Dinov2Config(image_size=518))
