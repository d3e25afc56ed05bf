"""Features without a trained network: a small convolutional one of fixed random weights."""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deco_fast.evaluation.extractors import Features, float32_convolutions
from deco_fast.evaluation.fingerprint import fingerprint_of

_SEED = 20150225
_WIDTHS = (3, 32, 64, 128)
_SLOPE = 0.2


class RandomConvExtractor:
    """Mean and deviation over space of every channel of three random layers: 448 features.

    Convolutions of 3×3 and stride 2 with leaky ReLU, weights normal with He's deviation, from
    NumPy's Philox generator under one seed: the same on any machine.

    For comparisons on a laptop, where nothing is downloaded. Their limits: they know textures,
    edges and colours at three scales, and no objects; a distance compares only with others of the
    same image size and number of images, and never with an FID.

    Args:
        device: where it computes.
    """

    name = "random-conv"

    def __init__(self, device: torch.device) -> None:
        generator = np.random.Generator(np.random.Philox(_SEED))
        self._weights = []
        for inputs, outputs in itertools.pairwise(_WIDTHS):
            normal = generator.standard_normal((outputs, inputs, 3, 3))
            # Of leaky ReLU, after which the deviation is what it was before.
            deviation = (2 / ((1 + _SLOPE**2) * inputs * 9)) ** 0.5
            self._weights.append(torch.from_numpy(normal * deviation).float().to(device))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights."""
        return fingerprint_of({str(i): weight for i, weight in enumerate(self._weights)})

    @torch.no_grad()
    @float32_convolutions()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W) of at least 8×8 pixels."""
        x = images.float() / 127.5 - 1
        found = []
        for weight in self._weights:
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), _SLOPE)
            deviations, means = torch.std_mean(x, dim=(2, 3), correction=0)
            found += [means, deviations]
        return Features(torch.cat(found, dim=1))
