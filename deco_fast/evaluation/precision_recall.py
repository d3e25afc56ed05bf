"""Improved precision and recall (Kynkäänniemi et al., 2019), as the ADM suite has them: k = 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from deco_fast.training.distributed import Processes

NEIGHBOURS = 3
"""A vector's ball reaches to so-manieth of its nearest neighbours."""

# Distances at a time: 32 MiB, whatever the sizes of the sets.
_ROWS, _COLUMNS = 1024, 8192


class PrecisionRecall(NamedTuple):
    """Fractions, 0 to 1: of the images within the reference's manifold, and the reverse."""

    precision: float
    recall: float


def precision_recall(
    reference: Tensor, images: Tensor, processes: Processes, progress: bool = False
) -> PrecisionRecall:
    """Precision and recall of images by their features.

    The union of the balls around a set's vectors stands for its manifold. Distances are in
    float32, in blocks that the processes share (the ADM suite rounds the features to float16).

    Args:
        reference: (M, D) float32 on the CPU, the same in every process; M at least 4.
        images: (N, D) float32 likewise; N at least 4.
        processes: this process among those that share the work.
        progress: show a bar.

    Raises:
        ValueError: a set has no third neighbours.
    """
    for name, features in (("reference", reference), ("images", images)):
        if len(features) <= NEIGHBOURS:
            raise ValueError(
                f"{name}: {len(features)} vectors have no {NEIGHBOURS} neighbours each"
            )
    # Distances are differences of squares: less cancels about the mean.
    first, other = (_Rows(rows, reference.mean(dim=0), processes) for rows in (reference, images))
    with tqdm(
        total=2 * (len(first.share) + len(other.share)),
        desc="precision and recall",
        unit="image",
        disable=not progress,
        leave=False,
    ) as bar:
        first_radii, other_radii = _radii(first, bar), _radii(other, bar)
        precision = _fraction_inside(other, first, first_radii, bar)
        recall = _fraction_inside(first, other, other_radii, bar)
    return PrecisionRecall(precision, recall)


class _Rows:
    """A set's features, in centred blocks on the device.

    Attributes:
        share: the rows of this process.
    """

    def __init__(self, features: Tensor, centre: Tensor, processes: Processes) -> None:
        self.features, self.centre, self.processes = features, centre, processes
        self.share = processes.share(len(features))

    def own_blocks(self) -> Iterator[Tensor]:
        """Those of this process's share."""
        return self._blocks(self.share, _ROWS)

    def all_blocks(self) -> Iterator[Tensor]:
        """Those of the whole set."""
        return self._blocks(range(len(self.features)), _COLUMNS)

    def _blocks(self, rows: range, size: int) -> Iterator[Tensor]:
        for start in range(rows.start, rows.stop, size):
            block = self.features[start : min(start + size, rows.stop)] - self.centre
            yield block.to(self.processes.device)


def _radii(rows: _Rows, bar: tqdm) -> Tensor:
    """Squared distance (N,) of each vector to its third neighbour; copies of it are neighbours."""
    found = [torch.empty(0)]
    for block in rows.own_blocks():
        nearest = torch.empty(len(block), 0, device=block.device)
        for columns in rows.all_blocks():
            distances = torch.cat([nearest, _squared_distances(block, columns)], dim=1)
            # The vector itself is the nearest.
            count = min(NEIGHBOURS + 1, distances.shape[1])
            nearest = distances.topk(count, dim=1, largest=False).values
        found.append(nearest[:, -1].cpu())
        bar.update(len(block))
    return rows.processes.gather_rows(torch.cat(found))


def _fraction_inside(rows: _Rows, balls: _Rows, radii: Tensor, bar: tqdm) -> float:
    """The fraction of the vectors that lie within any of the balls."""
    inside = torch.zeros(1, dtype=torch.int64)
    for block in rows.own_blocks():
        found = torch.zeros(len(block), dtype=torch.bool, device=block.device)
        limits = radii.to(block.device).split(_COLUMNS)
        for centres, limit in zip(balls.all_blocks(), limits, strict=True):
            found |= (_squared_distances(block, centres) <= limit).any(dim=1)
        inside += found.sum().cpu()
        bar.update(len(block))
    return int(rows.processes.gather_rows(inside).sum()) / len(rows.features)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    squares = torch.addmm(columns.square().sum(dim=1), rows, columns.T, alpha=-2)
    return squares.add_(rows.square().sum(dim=1, keepdim=True)).clamp_(min=0)
