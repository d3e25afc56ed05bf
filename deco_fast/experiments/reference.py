"""The real images of a suite: their statistics and their spectrum, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.config import RunConfig
from deco_fast.data.shards.locate import find_shards
from deco_fast.errors import UserError
from deco_fast.evaluation.extractors import FeatureExtractor
from deco_fast.evaluation.fingerprint import files_fingerprint
from deco_fast.evaluation.image_sets import ImageSet
from deco_fast.evaluation.metrics import ReferenceSet, needs_rows, open_reference
from deco_fast.evaluation.spectrum import LabelledBatch, block_energy
from deco_fast.evaluation.statistics import SetStatistics, load_statistics
from deco_fast.experiments.folder import NOTE_FILE, STATISTICS_FILE, SuiteFolder
from deco_fast.experiments.suite import DATASET, Evaluation
from deco_fast.sampling.images import to_uint8
from deco_fast.training.batches import TrainingImages, open_dataset
from deco_fast.training.distributed import Processes


@dataclass(frozen=True)
class Reference:
    """What drawn images are compared with.

    Attributes:
        identity: which images these are; another after a change of any of them.
        statistics: in the extractor's features.
        energy: of each DCT frequency (block²,); None where the reference is statistics alone.
    """

    identity: str
    statistics: SetStatistics
    energy: Tensor | None


class DatasetImages:
    """The training images as an `ImageSet`, in the data set's order or a random one.

    Args:
        dataset: the images.
        config: of a run that trains on them.
        order: the numbers of the images; None is all of them in their order.
    """

    def __init__(
        self, dataset: TrainingImages, config: RunConfig, order: Tensor | None = None
    ) -> None:
        self.path = Path(config.data.dataset)
        self.height, self.width = config.data.height, config.data.width
        self._dataset = dataset
        self._order = torch.arange(len(dataset)) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def batches(self, numbers: range, batch_size: int) -> Iterator[Tensor]:
        """See `ImageSet`."""
        for images, _ in self.labelled(numbers, batch_size):
            yield images

    def labelled(self, numbers: range, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with their labels (B,)."""
        for start in range(numbers.start, numbers.stop, batch_size):
            chosen = self._order[start : min(start + batch_size, numbers.stop)].tolist()
            pairs = [self._dataset[index] for index in chosen]
            images = torch.stack([image for image, _ in pairs])
            if images.is_floating_point():
                images = to_uint8(images).permute(0, 3, 1, 2)
            yield images, torch.tensor([label for _, label in pairs])


class WatchedImages:
    """An image set whose spectrum is summed up while its images pass.

    Args:
        images: the set.

    Attributes:
        seen: whether any has passed.
    """

    def __init__(self, images: ImageSet) -> None:
        self.seen = False
        self.path, self.height, self.width = images.path, images.height, images.width
        self._images, self._sum = images, torch.zeros(1)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, numbers: range, batch_size: int) -> Iterator[Tensor]:
        """See `ImageSet`."""
        for batch in self._images.batches(numbers, batch_size):
            self.seen = True
            self._sum = self._sum + len(batch) * image_energy(batch)
            yield batch

    def energy(self, processes: Processes) -> Tensor:
        """Of each DCT frequency (block²,), once all processes together have seen all images."""
        return processes.gather_rows(self._sum[None]).sum(dim=0) / len(self)


def shuffled(config: RunConfig, count: int, seed: int) -> DatasetImages:
    """So many training images, drawn without replacement."""
    dataset = open_dataset(config)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)[:count]
    return DatasetImages(dataset, config, order)


def labelled_batches(config: RunConfig, count: int, batch_size: int) -> Iterator[LabelledBatch]:
    """Training images in [−1, 1] with their labels, for the spectrum of the DiT's output."""
    images = shuffled(config, count, seed=0)
    for pixels, labels in images.labelled(range(len(images)), batch_size):
        yield LabelledBatch(pixels.float() / 127.5 - 1, labels)


def suite_reference(
    evaluation: Evaluation,
    config: RunConfig,
    extractor: FeatureExtractor,
    folder: Path,
    processes: Processes,
) -> Reference:
    """The reference of a suite, from its folder if it is there.

    Args:
        evaluation: what is needed of it.
        config: of any of its runs, whose data are the same.
        extractor: on the process's device.
        folder: the suite's.
        processes: those that share the work.

    Raises:
        UserError: it cannot be read or kept, or others' files are where it would be.
    """
    where = SuiteFolder(folder)
    where.check(evaluation.reference)
    keep_rows = needs_rows(evaluation.metrics)
    if evaluation.reference == DATASET:
        dataset = open_dataset(config)
        opened = ReferenceSet(None, DatasetImages(dataset, config))
        identity = processes.from_main(
            dataset_identity(dataset, config) if processes.is_main else ""
        )
    else:
        path = Path(evaluation.reference)
        opened = open_reference(path, extractor)
        identity = f"{path.resolve()} {files_fingerprint(path)}"
    note = {"identity": identity, "rows": keep_rows, "extractor": extractor.fingerprint}
    kept = processes.from_main(_read_note(folder / NOTE_FILE, note) if processes.is_main else None)
    if kept is not None:
        try:
            statistics = load_statistics(folder / STATISTICS_FILE, extractor)
        except UserError as error:
            raise UserError(
                f"{folder / STATISTICS_FILE}, where the suite keeps its reference, is damaged: "
                "delete it, and it is made again"
            ) from error
        listed = kept["energy"]
        energy = None if listed is None else torch.tensor(listed, dtype=torch.float64)
        return Reference(identity, statistics, energy)
    watched = None if opened.images is None else WatchedImages(opened.images)
    statistics = opened._replace(images=watched).statistics(
        extractor, processes, evaluation.batch_size, keep_rows
    )
    energy = None
    if watched is not None:
        if not watched.seen:  # where the statistics were saved beside them
            for _ in watched.batches(processes.share(len(watched)), evaluation.batch_size):
                pass
        energy = watched.energy(processes)
    if processes.is_main:
        where.claim()
        # A note of others beside new statistics would pass for theirs.
        (folder / NOTE_FILE).unlink(missing_ok=True)
        statistics.save(folder / STATISTICS_FILE, extractor)
        kept = {**note, "energy": None if energy is None else energy.tolist()}
        with atomic_file(folder / NOTE_FILE) as temporary:
            temporary.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    processes.barrier()
    return Reference(identity, statistics, energy)


def dataset_identity(dataset: TrainingImages, config: RunConfig) -> str:
    """A hash of what decides on the pixels and labels of training images.

    A data set's own fingerprint is of names and labels: a run may resume where the same images
    lie in another folder, while what was computed of them is kept for the very files.

    Raises:
        UserError: a folder cannot be read.
    """
    data = config.data
    roots: list[Path] = []
    if data.dataset == "shards":
        assert data.root is not None
        roots = find_shards(data.root)
    elif data.dataset == "folder":
        assert isinstance(data.root, str)
        roots = [Path(data.root)]
    parts = {
        "dataset": data.dataset,
        "fingerprint": dataset.fingerprint,
        "size": (data.height, data.width),
        "random_flip": data.random_flip,
        "crop": data.crop,
        "skip_small": data.skip_small,
        "files": [files_fingerprint(root) for root in roots],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def image_energy(images: Tensor) -> Tensor:
    """The spectrum of uint8 images (B, 3, H, W), on the scale of [−1, 1]."""
    return block_energy(images.float() / 127.5 - 1)


def _read_note(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(note, dict) and all(note.get(key) == expected[key] for key in expected)
    return note if fits and path.with_name(STATISTICS_FILE).is_file() else None
