"""What a set of images amounts to in an extractor's features, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.errors import UserError
from deco_fast.evaluation.extractors import FeatureExtractor
from deco_fast.evaluation.frechet import Moments
from deco_fast.evaluation.npz import READ_ERRORS, npz_keys

# The ADM suite's names: its evaluator reads these files as well, and this one reads its own.
_POOLED = ("mu", "sigma")
_SPATIAL = ("mu_s", "sigma_s")
_ROWS = "pool_features"
_NOTE = "deco_fast"

# Of the largest value: in half precision three digits are kept.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class SetStatistics:
    """A set of images in an extractor's features.

    Attributes:
        count: images; None where the file does not tell.
        pooled: mean and covariance for the Fréchet distance.
        spatial: those for sFID; None where there are none.
        rows: the pooled features (N, D) float32 themselves, for precision and recall; None
            likewise.
        inception_score: None where it was not computed.
        size: height and width of the images; None where the file does not tell.
    """

    count: int | None
    pooled: Moments
    spatial: Moments | None = None
    rows: Tensor | None = None
    inception_score: float | None = None
    size: tuple[int, int] | None = None

    def save(self, path: Path, extractor: FeatureExtractor) -> None:
        """Write them for the next time.

        Raises:
            UserError: the file cannot be written, or they are of a single image.
        """
        if self.pooled.count < 2:
            raise UserError(f"{path}: statistics of one image have no covariance: give more images")
        note = {
            "features": extractor.name,
            "fingerprint": extractor.fingerprint,
            "count": self.count,
            "size": self.size,
        }
        arrays: dict[str, Any] = {_NOTE: np.array(json.dumps(note))}
        for names, moments in ((_POOLED, self.pooled), (_SPATIAL, self.spatial)):
            if moments is not None:
                values = (moments.mean.cpu().numpy(), moments.covariance.cpu().numpy())
                arrays |= dict(zip(names, values, strict=True))
        if self.rows is not None:
            arrays[_ROWS] = self.rows.numpy()
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


def holds_statistics(path: Path) -> bool:
    """Whether a file has a mean and a covariance in it, ours or others'."""
    return set(_POOLED) <= npz_keys(path)


def holds_own_statistics(path: Path) -> bool:
    """Whether a file is `SetStatistics.save`'s, with nothing else in it."""
    return {_NOTE, *_POOLED} <= npz_keys(path) <= {_NOTE, *_POOLED, *_SPATIAL, _ROWS}


def load_statistics(path: Path, extractor: FeatureExtractor) -> SetStatistics:
    """The statistics in a file: `SetStatistics.save`'s, the ADM suite's, or pytorch-fid's.

    What is not ours counts as of the Inception network.

    Raises:
        UserError: it is damaged, or of another extractor.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            note = json.loads(str(file[_NOTE])) if _NOTE in file else {}
            if not isinstance(note, dict):
                raise ValueError(f"its note is {note!r}")
            _check(path, note, extractor)
            count = note.get("count")
            pooled = _moments(file, _POOLED, count)
            spatial = _moments(file, _SPATIAL, count) if _SPATIAL[0] in file else None
            rows = _rows(file, pooled.size) if _ROWS in file else None
            size = None if (sides := note.get("size")) is None else (int(sides[0]), int(sides[1]))
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(
            f"{path} holds no readable statistics ({error}): make them again by --save-statistics"
        ) from error
    return SetStatistics(count, pooled, spatial, rows, size=size)


def _moments(file: Any, names: tuple[str, str], count: int | None) -> Moments:
    mean, covariance = (_real(file, name).double() for name in names)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{names[0]} is {tuple(mean.shape)}, {names[1]} {tuple(covariance.shape)}")
    tolerance = _ROUNDING * covariance.abs().max()
    if (covariance - covariance.T).abs().max() > tolerance:
        raise ValueError(f"{names[1]} is not symmetric")
    if torch.linalg.eigvalsh(covariance)[0] < -(len(mean) ** 0.5) * tolerance:
        raise ValueError(f"{names[1]} has negative eigenvalues, as no covariance")
    # The number of images only undoes the divisor that it was divided by.
    return Moments.of(mean, covariance, count or 2)


def _rows(file: Any, size: int) -> Tensor:
    rows = _real(file, _ROWS)
    if rows.ndim != 2 or rows.shape[1] != size:
        raise ValueError(f"{_ROWS} is {tuple(rows.shape)}, of {size} features")
    return rows.float()


def _real(file: Any, name: str) -> Tensor:
    """A numeric array, finite and not empty."""
    array = file[name]
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {array.dtype}")
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} is {'not finite' if array.size else 'empty'}")
    return torch.from_numpy(array)


def _check(path: Path, note: dict[str, Any], extractor: FeatureExtractor) -> None:
    features = note.get("features", "inception")
    if features != extractor.name:
        raise UserError(
            f"{path} holds statistics of {features} features: give --features {features}, or "
            "another --reference"
        )
    if note and note["fingerprint"] != extractor.fingerprint:
        raise UserError(
            f"{path} holds statistics of {features} with other weights: give the same --weights, "
            "or make them again by --save-statistics"
        )
