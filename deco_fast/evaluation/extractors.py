"""The networks whose features images are compared by, under their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deco_fast.errors import UserError, nearest


class Features(NamedTuple):
    """What an extractor finds in a batch; float32.

    Attributes:
        pooled: (B, D), for the Fréchet distance, precision and recall.
        spatial: (B, S), for sFID; None where the extractor has no such features.
        logits: (B, K) of a classifier, for the Inception score; None likewise.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureExtractor(Protocol):
    """A fixed function of images.

    Attributes:
        name: in `EXTRACTORS`.
        fingerprint: a hash of its weights: features of others do not compare.
    """

    name: str

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W), on their device."""
        ...


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions in float32 on GPUs as well, where torch rounds their inputs to TF32 otherwise:
    what a CPU has found compares with what a GPU finds."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _inception(weights: str | None, device: torch.device) -> FeatureExtractor:
    from deco_fast.evaluation.inception import InceptionExtractor

    return InceptionExtractor(weights, device)


def _dinov2(weights: str | None, device: torch.device) -> FeatureExtractor:
    from deco_fast.evaluation.dinov2 import DINOv2Extractor

    return DINOv2Extractor(weights, device)


def _random_conv(weights: str | None, device: torch.device) -> FeatureExtractor:
    from deco_fast.evaluation.random_conv import RandomConvExtractor

    if weights is not None:
        raise UserError("--weights: the weights of random-conv are fixed, leave the option out")
    return RandomConvExtractor(device)


# Imported at use: two of them need optional packages.
EXTRACTORS: dict[str, Callable[[str | None, torch.device], FeatureExtractor]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "random-conv": _random_conv,
}


def check_extractor(name: str) -> None:
    """Raise ValueError unless there is such an extractor; the nearest name is suggested."""
    if name not in EXTRACTORS:
        raise ValueError(f"unknown features '{name}'{nearest(name, EXTRACTORS)}")


def open_extractor(
    name: str, weights: str | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor of that name.

    Args:
        name: "inception" (the ADM suite's), "dinov2" or "random-conv".
        weights: their file; None downloads them, or takes what was downloaded before.
        device: where it computes.

    Raises:
        UserError: there is none, its weights cannot be had, or a package is missing.
    """
    try:
        check_extractor(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    return EXTRACTORS[name](weights, torch.device(device))
