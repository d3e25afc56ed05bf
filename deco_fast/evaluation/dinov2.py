"""DINOv2's class token, for the Fréchet distance in its features (Stein et al., 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_fast.alignment import load_encoder
from deco_fast.evaluation.extractors import Features, float32_convolutions

# The network that the distance is named for, and the size that it was evaluated at.
_WEIGHTS = "hf:facebook/dinov2-large/model.safetensors"
_SIZE = 224
_PATCH = 14


class DINOv2Extractor:
    """The class token of images scaled to 224×224 (bicubic, with antialiasing); float32.

    Args:
        weights: as for `deco_fast.alignment.load_encoder`; None is DINOv2-L/14 from the hub.
        device: where it computes.

    Raises:
        UserError: transformers is not installed, or the weights cannot be had.
    """

    name = "dinov2"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        encoder = load_encoder(
            weights or _WEIGHTS,
            patch_size=_PATCH,
            precision="fp32",
            purpose="--features dinov2",
            option="--weights",
            instead="choose other --features",
            size="l",
        )
        self._encoder = encoder.to(device)
        self.fingerprint: str = encoder.fingerprint

    @torch.no_grad()
    @float32_convolutions()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W)."""
        pixels = F.interpolate(
            images.float(), size=(_SIZE, _SIZE), mode="bicubic", antialias=True
        ).clamp(0, 255)
        return Features(self._encoder.class_tokens(pixels / 127.5 - 1))
