"""FID, sFID, Inception score, precision and recall as the ADM suite defines them.

Images stream through the extractor; what is kept is a mean and a covariance, and, where precision
and recall are asked for, the pooled features: 400 MB for 50,000 of Inception's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from deco_fast.errors import UserError, nearest
from deco_fast.evaluation.extractors import FeatureExtractor, Features
from deco_fast.evaluation.frechet import Moments, frechet_distance
from deco_fast.evaluation.image_sets import KEY, ImageSet, open_images
from deco_fast.evaluation.inception_score import InceptionScore
from deco_fast.evaluation.npz import npz_keys
from deco_fast.evaluation.precision_recall import NEIGHBOURS, precision_recall
from deco_fast.evaluation.statistics import SetStatistics, holds_statistics, load_statistics
from deco_fast.training.distributed import Processes

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
"""All that there is. With other features than Inception's "fid" is the Fréchet distance in them."""

_NEED_ROWS = frozenset({"precision", "recall"})


def parse_metrics(text: str) -> tuple[str, ...]:
    """Metrics from a list with commas.

    Raises:
        ValueError: one has no such name; the nearest is suggested.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric '{name}'{nearest(name, METRICS)}")
    return names


def needs_rows(metrics: Collection[str] | None) -> bool:
    """Whether features have to be kept for these metrics; None is all."""
    return metrics is None or bool(_NEED_ROWS & set(metrics))


class Collector:
    """Takes in the features of a set of images batch by batch, on one of several processes.

    Args:
        count: images in the whole set.
        numbers: those of this process, consecutive.
        processes: this process among those that share the set.
        keep_rows: keep the pooled features, for precision and recall.
    """

    def __init__(
        self, count: int, numbers: range, processes: Processes, keep_rows: bool = True
    ) -> None:
        self.count, self.processes = count, processes
        self._numbers, self._seen, self._keep_rows = numbers, 0, keep_rows
        self._pooled: Moments | None = None
        self._spatial: Moments | None = None
        self._score: InceptionScore | None = None
        self._rows: Tensor | None = None

    def add(self, features: Features) -> None:
        """Take in the next images' features."""
        pooled, spatial, logits = features
        if self._pooled is None:
            self._begin(features)
        assert self._pooled is not None
        if not bool(pooled.isfinite().all()):
            raise UserError("the extractor's features are not finite: its weights are to blame")
        self._pooled.add(pooled)
        if spatial is not None and self._spatial is not None:
            self._spatial.add(spatial)
        if logits is not None and self._score is not None:
            self._score.add(logits, self._numbers.start + self._seen)
        if self._rows is not None:
            self._rows[self._seen : self._seen + len(pooled)] = pooled.cpu()
        self._seen += len(pooled)

    def _begin(self, features: Features) -> None:
        pooled, spatial, logits = features
        device = pooled.device
        self._pooled = Moments(pooled.shape[1], device)
        if spatial is not None:
            self._spatial = Moments(spatial.shape[1], device)
        if logits is not None:
            self._score = InceptionScore(self.count, logits.shape[1], device)
        if self._keep_rows:
            self._rows = torch.empty(len(self._numbers), pooled.shape[1])

    def finish(self, size: tuple[int, int] | None = None) -> SetStatistics:
        """The statistics over all processes, in each of them; `size` is the images'."""
        processes = self.processes
        assert self._pooled is not None, "every process has images"
        return SetStatistics(
            self.count,
            self._pooled.gathered(processes),
            None if self._spatial is None else self._spatial.gathered(processes),
            None if self._rows is None else processes.gather_rows(self._rows),
            None if self._score is None else self._score.value(processes),
            size,
        )


def evaluate_images(
    images: ImageSet,
    extractor: FeatureExtractor,
    processes: Processes,
    batch_size: int = 64,
    keep_rows: bool = True,
) -> SetStatistics:
    """The statistics of a set of images, whose processes share the work.

    Args:
        images: at least one for each process.
        extractor: on the process's device.
        processes: this process among them.
        batch_size: images at a time.
        keep_rows: keep the pooled features, for precision and recall.

    Raises:
        UserError: an image cannot be read, or there are too few.
    """
    count = len(images)
    if count < processes.world_size:
        raise UserError(
            f"{images.path} holds {count} image(s) for {processes.world_size} processes: "
            "start fewer"
        )
    numbers = processes.share(count)
    collector = Collector(count, numbers, processes, keep_rows)
    with tqdm(
        total=len(numbers),
        desc=f"features of {images.path.name}",
        unit="image",
        disable=not processes.is_main,
        dynamic_ncols=True,
    ) as bar:
        for batch in images.batches(numbers, batch_size):
            collector.add(extractor(batch.to(processes.device)))
            bar.update(len(batch))
    return collector.finish((images.height, images.width))


class ReferenceSet(NamedTuple):
    """A reference that is open: at least one of both.

    A batch of the ADM suite holds both: its statistics are those of the whole data set, and its
    images serve for precision and recall, as there.

    Attributes:
        saved: the statistics that a file keeps.
        images: to compute them from.
    """

    saved: SetStatistics | None
    images: ImageSet | None

    def statistics(
        self,
        extractor: FeatureExtractor,
        processes: Processes,
        batch_size: int = 64,
        keep_rows: bool = True,
    ) -> SetStatistics:
        """Those saved, or of all images; the arguments as for `evaluate_images`.

        Raises:
            UserError: an image cannot be read, or there are too few.
        """
        saved, images = self
        if images is None or (saved is not None and (saved.rows is not None or not keep_rows)):
            assert saved is not None
            return saved
        computed = evaluate_images(images, extractor, processes, batch_size, keep_rows)
        return computed if saved is None else dataclasses.replace(saved, rows=computed.rows)


def open_reference(
    path: Path, extractor: FeatureExtractor, crop: int | None = None
) -> ReferenceSet:
    """What a reference holds: a file that keeps statistics, or images as for `open_images`.

    Raises:
        UserError: it cannot be read, or is of another extractor.
    """
    if not holds_statistics(path):
        return ReferenceSet(None, open_images(path, crop))
    saved = load_statistics(path, extractor)
    if KEY not in npz_keys(path):
        return ReferenceSet(saved, None)
    images = open_images(path)
    return ReferenceSet(dataclasses.replace(saved, size=(images.height, images.width)), images)


def rehearse(
    images: ImageSet,
    reference: ReferenceSet,
    extractor: FeatureExtractor,
    metrics: Collection[str] | None,
    device: torch.device,
) -> None:
    """See on a few images whether two sets can be compared, before the work on all of them.

    Args:
        images, reference: the sets.
        extractor: on the device.
        metrics: as for `compare`.
        device: where the few images go.

    Raises:
        UserError: they cannot.
    """
    found, saved = _few(images, extractor, device), reference.saved
    if reference.images is not None and (saved is None or saved.rows is None):
        few = _few(reference.images, extractor, device)
        saved = few if saved is None else dataclasses.replace(saved, rows=few.rows)
    assert saved is not None
    check_comparable(found, saved, metrics)


def _few(images: ImageSet, extractor: FeatureExtractor, device: torch.device) -> SetStatistics:
    """The statistics of the first images, with the number of all."""
    few = range(min(len(images), NEIGHBOURS + 1))
    collector = Collector(len(few), few, Processes(0, 1, device))
    for batch in images.batches(few, len(few)):
        collector.add(extractor(batch.to(device)))
    return dataclasses.replace(collector.finish((images.height, images.width)), count=len(images))


def compare(
    images: SetStatistics,
    reference: SetStatistics,
    processes: Processes,
    metrics: Collection[str] | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """The metrics of a set of images against a reference.

    Args:
        images, reference: in the same features.
        processes: those that share the work of precision and recall.
        metrics: of `METRICS`; None is all that these statistics allow.
        progress: show a bar.

    Raises:
        UserError: one that is asked for cannot be had, or there are too few images for one.
    """
    chosen = check_comparable(images, reference, metrics)
    values: dict[str, float] = {}
    if "fid" in chosen:
        values["fid"] = frechet_distance(images.pooled, reference.pooled)
    if "sfid" in chosen:
        assert images.spatial is not None and reference.spatial is not None
        values["sfid"] = frechet_distance(images.spatial, reference.spatial)
    if "inception_score" in chosen:
        assert images.inception_score is not None
        values["inception_score"] = images.inception_score
    if needs_rows(chosen):
        assert images.rows is not None and reference.rows is not None
        found = precision_recall(reference.rows, images.rows, processes, progress)._asdict()
        values |= {name: value for name, value in found.items() if name in chosen}
    return values


def check_comparable(
    images: SetStatistics, reference: SetStatistics, metrics: Collection[str] | None = None
) -> list[str]:
    """The metrics that `compare` would compute.

    Raises:
        UserError: as `compare`.
    """
    possible = [name for name in METRICS if _possible(name, images, reference)]
    for name in metrics or ():
        if name not in possible:
            raise UserError(
                f"{name} cannot be computed from these features and this reference: possible "
                f"are {', '.join(possible)}"
            )
    chosen = [name for name in possible if metrics is None or name in metrics]
    if images.size and reference.size and images.size != reference.size:
        raise UserError(
            f"the images are {images.size[0]}×{images.size[1]} and the reference "
            f"{reference.size[0]}×{reference.size[1]}: draw or cut them alike (--crop)"
        )
    for name in chosen:
        _check_enough(name, images, "images")
        _check_enough(name, reference, "reference")
        _check_alike(name, images, reference)
    return chosen


def _possible(name: str, images: SetStatistics, reference: SetStatistics) -> bool:
    needed = {
        "fid": (images.pooled, reference.pooled),
        "sfid": (images.spatial, reference.spatial),
        "inception_score": (images.inception_score,),
        "precision": (images.rows, reference.rows),
        "recall": (images.rows, reference.rows),
    }
    return all(value is not None for value in needed[name])


def _check_alike(name: str, images: SetStatistics, reference: SetStatistics) -> None:
    """Statistics of others do not say what they are of."""
    if name not in ("fid", "sfid"):
        return
    own, other = (s.pooled if name == "fid" else s.spatial for s in (images, reference))
    assert own is not None and other is not None
    if own.mean.shape != other.mean.shape:
        raise UserError(
            f"the reference's statistics are of {len(other.mean):,} features and not of "
            f"{len(own.mean):,}: name one of the same --features"
        )
    if not (other.mean.isfinite().all() and other.covariance.isfinite().all()):
        raise UserError("the reference's statistics are not finite: make them again")


def _check_enough(name: str, statistics: SetStatistics, what: str) -> None:
    """A covariance of D features has full rank from D + 1 images on; fewer give a smaller one."""
    if name in ("fid", "sfid"):
        moments = statistics.pooled if name == "fid" else statistics.spatial
        assert moments is not None
        needed, reason = moments.size + 1, f"{name} of {moments.size:,} features"
    elif name in _NEED_ROWS:
        needed, reason = NEIGHBOURS + 1, name
    else:
        return
    held = statistics.count
    if name in _NEED_ROWS and statistics.rows is not None:
        # A data set's statistics may come with the rows of fewer images; at a rehearsal it is the
        # number of images that may be less.
        held = min(len(statistics.rows), held or len(statistics.rows))
    if held is not None and held < needed:
        raise UserError(
            f"{reason} needs at least {needed:,} images and the {what} holds {held:,}: give more "
            "(50,000 is usual), or leave it out of --metrics"
        )
