"""The batches of a run, and what its checkpoints say of them.

Where a run stands in its data is a function of the step alone (`EpochBatches`), so nothing has to
be carried from worker to worker or fast-forwarded. torchdata's `StatefulDataLoader` would add
nothing: with a sampler of indices its state is the number of batches handed out, it resumes by
drawing and dropping as many, and its state is of one rank among as many as there were. What a
checkpoint keeps is what has to be the same when the run goes on, and is checked.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deco_fast.data.damage import DamageRecord
from deco_fast.data.order import EpochBatches
from deco_fast.data.transforms import normalise
from deco_fast.errors import UserError


class LabelledImages(Protocol):
    """What a run trains on: (3, H, W) uint8 pixels or float32 in [-1, 1], and a label.

    Attributes:
        damage: what could not be read; None where nothing is read from a disk.
    """

    damage: DamageRecord | None

    @property
    def fingerprint(self) -> str:
        """Differs where samples or their order differ."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class BatchLoader:
    """Batches of one process from any step on, decoded ahead by worker processes.

    Workers come from a fork server where the system has one, and are never forked from this
    process: it runs threads by then (torch's, CUDA's, the process group's), and a lock that one of
    them holds at the moment of a fork stays locked in the child for ever.

    Args:
        dataset: what is drawn from.
        batch_size: samples of a step over all processes.
        seed: of the order.
        rank, world_size: this process among those of the run.
        workers: processes that decode; 0 decodes in this one.
        prefetch: batches that each worker reads ahead.
        device: where the batches shall be.

    Raises:
        UserError: as `EpochBatches`.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.prefetch = prefetch
        self.device = torch.device(device)
        self._order = functools.partial(
            EpochBatches, len(dataset), batch_size, seed, rank, world_size
        )
        self._order()  # refuses wrong numbers now

    def batches(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless stream: (images, labels) of `start_step`, counted from 0, and what follows.

        Images are (batch_size / world_size, 3, H, W) float32 in [-1, 1] on the device, labels
        int64.

        Raises:
            UserError: as the dataset.
        """
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            self.dataset,
            batch_sampler=self._order(start_step),
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            multiprocessing_context=_context() if self.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        batches = iter(loader)
        while True:
            try:
                images, labels = next(batches)
            except UserError as error:
                # From a worker the message comes wrapped in that worker's traceback.
                raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
            # On the current stream: 6 MB of a batch take a quarter of a millisecond over PCIe.
            images = images.to(self.device, non_blocking=True)
            yield (
                normalise(images) if images.dtype == torch.uint8 else images,
                labels.to(self.device, non_blocking=True),
            )

    def state(self, step: int) -> dict[str, Any]:
        """What the checkpoint after `step` steps keeps: where the run stands, and in which data.

        The epoch and the samples of it that have been drawn follow from the step; they are there
        for people. `damaged` holds the numbers of the images found damaged so far.
        """
        images = len(self.dataset)
        epoch, drawn = divmod(step * self.batch_size, images)
        damage = self.dataset.damage
        return {
            "step": step,
            "epoch": epoch,
            "drawn_in_epoch": drawn,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "images": images,
            "fingerprint": self.dataset.fingerprint,
            "damaged": [] if damage is None else damage.indices(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See that going on from `state` gives the batches of the unbroken run.

        What it says of damaged images is added to what this process knows.

        Raises:
            UserError: the data, the seed or the batch size are others; the first is named.
        """
        now = self.state(0)
        for key, name, remedy in (
            ("seed", "training.seed", "give the old value"),
            ("batch_size", "training.batch_size", "give the old value"),
            ("images", "the number of images", "restore the data"),
            ("fingerprint", "the hash of the images' names and labels", "restore the data"),
        ):
            # Checkpoints of deco_fast 0.1 name only the seed.
            before = state.get(key, now[key])
            if before != now[key]:
                raise UserError(
                    f"{name} was {before} when the run stopped, is {now[key]}: it cannot go on "
                    f"exactly; {remedy}, or start a new run with --out FOLDER"
                )
        damage = self.dataset.damage
        if damage is not None and state.get("damaged"):
            flags = torch.zeros_like(damage.flags)
            flags[torch.tensor(state["damaged"])] = True
            damage.merge(flags)


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once by the server, not again by every worker.
    context.set_forkserver_preload(["__main__", "deco_fast.data"])
    return context


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal: loaders must live until the main process
    # has saved and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torch's own watch compares the parent's number, which is the fork server's and lives as long
    # as its workers: after a kill -9 of the main process all of them would stay.
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
