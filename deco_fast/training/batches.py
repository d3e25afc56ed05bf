"""The batches of a run: the dataset of its configuration, read in the order of its seed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deco_fast.config import RunConfig
from deco_fast.data.digits import DigitsDataset
from deco_fast.data.folder import FolderDataset
from deco_fast.data.order import EpochBatches
from deco_fast.errors import UserError
from deco_fast.training.distributed import Processes


class Batch(NamedTuple):
    """This process's share of a step's global batch, on the CPU.

    Attributes:
        images: (B, 3, H, W) float32 in [−1, 1].
        labels: (B,) int64.
        indices: (B,) int64, of the samples in the dataset.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Batches:
    """An endless iterator over this process's batches, from any step on.

    Args:
        dataset: from `open_dataset`.
        config: the run.
        processes: this process among those of the run.
        start_step: the 0-based step of the first batch.
    """

    def __init__(
        self,
        dataset: DigitsDataset | FolderDataset,
        config: RunConfig,
        processes: Processes,
        start_step: int,
    ) -> None:
        workers = config.data.workers
        loader = DataLoader(
            _Indexed(dataset),
            batch_sampler=EpochBatches(
                len(dataset),
                config.training.batch_size,
                config.training.seed,
                processes.rank,
                processes.world_size,
                start_step,
            ),
            num_workers=workers,
            pin_memory=processes.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupt,
        )
        self._batches: Iterator[list[Tensor]] = iter(loader)
        self._seed = config.training.seed

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            UserError: the data cannot be used.
        """
        try:
            return Batch(*next(self._batches))
        except UserError as error:
            # From a loader's worker the message comes wrapped in that worker's traceback.
            raise UserError(str(error).rsplit("UserError: ", 1)[-1]) from error

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps has to hold for the order to go on."""
        return {"step": step, "seed": self._seed}


def open_dataset(config: RunConfig) -> DigitsDataset | FolderDataset:
    """The training images of a configuration.

    Raises:
        UserError: there are none where it says, or their classes are not the network's.
    """
    data = config.data
    if data.dataset == "digits":
        return DigitsDataset("train", data.height)
    if data.root is None:
        raise UserError("data.root is not set: give the folder of class folders by --data.root")
    dataset = FolderDataset(data.root, data.height, data.width, random_flip=data.random_flip)
    if len(dataset.classes) != config.model.num_classes:
        raise UserError(
            f"{data.root} has {len(dataset.classes)} class folders: "
            f"set --model.num_classes {len(dataset.classes)} (it is {config.model.num_classes})"
        )
    return dataset


class _Indexed(Dataset[tuple[Tensor, int, int]]):
    """A dataset whose samples say which they are."""

    def __init__(self, dataset: DigitsDataset | FolderDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = self.dataset[index]
        return image, label, index


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal: loaders must live until the main process
    # has saved and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
