"""Captions as conditions of a training step: prefixes, and dropout for guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PREFIXES = (
    "A photo of ",
    "An image of ",
    "A picture of ",
    "A photograph of ",
    "A snapshot of ",
    "This is a photo of ",
    "This picture shows ",
)
"""What may stand before a short caption. The published training has seven, of which only the first
is known."""

SHORT_WORDS = 30
"""A caption of fewer words is short (specification B.12)."""


def prefix_captions(
    captions: Sequence[str], probability: float, u: Tensor, choice: Tensor
) -> list[str]:
    """Put a prefix before short captions, with a probability in [0, 1].

    Args:
        captions: B of them.
        probability: of a prefix.
        u: (B,), uniform in [0, 1); a prefix comes where u < probability.
        choice: (B,), uniform in [0, 1); which one.
    """
    chosen = (choice * len(PREFIXES)).long().clamp(max=len(PREFIXES) - 1).tolist()
    return [
        PREFIXES[number] + caption if take and len(caption.split()) < SHORT_WORDS else caption
        for caption, take, number in zip(captions, (u < probability).tolist(), chosen, strict=True)
    ]


def drop_captions(captions: Sequence[str], probability: float, u: Tensor) -> list[str]:
    """Replace each caption by the empty one, the unconditional prompt, where u (B,) < probability.

    Before they are encoded: after it, as published, a feature that is not finite would spoil the
    batch (specification B.7).
    """
    dropped: list[bool] = torch.lt(u, probability).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
