"""The Inception score (Salimans et al., 2016) over splits of 5,000 images, as in the ADM suite."""

from __future__ import annotations

import torch
from torch import Tensor

from deco_fast.training.distributed import Processes

SPLIT = 5000
"""Images in a split; the splits follow the order of the images."""


class InceptionScore:
    """exp(mean KL(p(y|x) ‖ p(y))) of each split, averaged over the splits; sums in float64.

    Args:
        count: images that there will be.
        classes: of the classifier.
        device: where the sums are kept.
    """

    def __init__(self, count: int, classes: int, device: torch.device | str = "cpu") -> None:
        splits = -(-count // SPLIT)
        # Of each split, over its images: p(y|x), then Σ p log p and the number of images.
        self._sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, first: int) -> None:
        """Take in logits (B, classes) of the images numbered first, first + 1, …"""
        logs = logits.to(self._sums).log_softmax(dim=1)
        probabilities = logs.exp()
        negative_entropy = (probabilities * logs).sum(dim=1, keepdim=True)
        rows = torch.cat(
            [probabilities, negative_entropy, torch.ones_like(negative_entropy)], dim=1
        )
        splits = torch.arange(first, first + len(rows), device=rows.device) // SPLIT
        self._sums.index_add_(0, splits, rows)

    def value(self, processes: Processes) -> float:
        """The score over the images of all processes; 1 to the number of classes."""
        parts = processes.gather_rows(self._sums.cpu()[None])
        sums = parts.sum(dim=0)
        means = sums[:, :-1] / sums[:, -1:]
        marginal, negative_entropy = means[:, :-1], means[:, -1]
        divergence = negative_entropy - torch.special.xlogy(marginal, marginal).sum(dim=1)
        return float(divergence.exp().mean())
