"""Batches decoded ahead by worker processes."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deco_fast.data.damage import DamageRecord
from deco_fast.data.order import EpochBatches
from deco_fast.data.transforms import normalise
from deco_fast.errors import UserError

# For the main process to make its last step after a SIGTERM to all.
_RESPITE_SECONDS = 30


class Batch(NamedTuple):
    """This process's share of a step's global batch, on its device.

    Attributes:
        images: (B, 3, H, W) float32 in [−1, 1].
        labels: (B,) int64, or the B captions.
        indices: (B,) int64 on the CPU, of the samples in the dataset.
    """

    images: Tensor
    labels: Tensor | list[str]
    indices: Tensor


class LabelledImages(Protocol):
    """What is trained on: (3, H, W) pixels, uint8 or float32 in [−1, 1], and label or caption."""

    @property
    def damage(self) -> DamageRecord | None:
        """What could not be read; None where nothing is read from a disk."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs where samples or their order differ."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int | str]: ...


def read_batches(
    dataset: LabelledImages,
    order: EpochBatches,
    *,
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """The batches of an order, without end.

    Workers come from a fork server where the system has one and are never forked from this
    process: it runs threads by then (torch's, CUDA's, the process group's), and a lock that one of
    them holds at the moment of a fork stays locked in the child for ever.

    Pixels travel as uint8 and are normalised on the device, with the same result to the bit. The
    copy is on the current stream: 32 images of 256×256 are 6 MB, a quarter of a millisecond.

    Args:
        dataset: what is drawn from.
        order: which samples, from which step on.
        workers: processes that decode; 0 decodes in this one.
        prefetch: batches that each worker reads ahead.
        device: where the batches shall be.

    Raises:
        UserError: as the dataset, or a worker has died.
    """
    device = torch.device(device)
    loader: DataLoader[tuple[Tensor, int | str, int]] = DataLoader(
        _Indexed(dataset),
        batch_sampler=order,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context=_context() if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    others = set(multiprocessing.active_children())
    try:
        batches = iter(loader)
    except OSError as error:
        raise UserError(
            f"the loader's processes cannot be started ({error}): set TMPDIR to a folder with a "
            "short name, or data.workers to 0"
        ) from error
    with _killed_at_exit(set(multiprocessing.active_children()) - others):
        while True:
            read = _next(batches)
            if isinstance(read, str):
                del batches
                raise UserError(read)
            images, labels, indices = read
            images = images.to(device, non_blocking=True)
            yield Batch(
                normalise(images) if images.dtype == torch.uint8 else images,
                labels.to(device, non_blocking=True) if isinstance(labels, Tensor) else labels,
                indices,
            )


def _next(batches: Iterator[list[Any]]) -> list[Any] | str:
    """The next batch, or why there is none.

    No error leaves, and its traceback is cut: it would keep the workers until the garbage
    collector finds them, and then they take ten seconds to end.
    """
    try:
        return next(batches)
    except UserError as error:
        error.with_traceback(None)
        # From a worker the message comes wrapped in that worker's traceback.
        return str(error).rsplit("UserError: ", 1)[-1].strip()
    except (RuntimeError, OSError, EOFError) as error:
        # A batch that was ready comes through a connection to the worker, which breaks.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        error.with_traceback(None)
        return (
            f"a loader process has died ({error}): its memory may have run out; lower "
            "data.workers or data.prefetch, or give a container more shared memory"
        )


@contextmanager
def _killed_at_exit(workers: Collection[BaseProcess]) -> Iterator[None]:
    """Should Python end inside, it would send workers a SIGTERM, which they survive, and wait."""

    def kill() -> None:
        for worker in workers:
            worker.kill()

    atexit.register(kill)
    try:
        yield
    finally:
        atexit.unregister(kill)


class _Indexed(Dataset[tuple[Tensor, int | str, int]]):
    """A dataset whose samples say which they are."""

    def __init__(self, dataset: LabelledImages) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int | str, int]:
        image, label = self.dataset[index]
        return image, label, index


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once by the server, not again by every worker.
    context.set_forkserver_preload(["__main__", "deco_fast.data.worker_server"])
    return context


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and a scheduler's SIGTERM every process of the
    # run: workers must live until the main process has saved and ends them. It does so by SIGTERM
    # too if one does not answer, hence a respite and no deafness.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, which has no SIGTERM either
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of a closed terminal likewise
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_RESPITE_SECONDS))
        # The fork server holds it back until a worker is ready for it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # torch's own watch looks at the parent's number, here the fork server's, which lives as long
    # as a worker does: after a kill -9 of the main process all of them would stay.
    threading.Thread(target=_follow_main_process, daemon=True).start()


def _follow_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)
