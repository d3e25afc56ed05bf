"""The order in which samples are drawn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from deco_fast.errors import UserError


class EpochBatches(Sampler[list[int]]):
    """An endless stream of batches, one for each training step, that can start at any step.

    Every epoch is a permutation of the dataset, drawn from a generator seeded by a hash of
    `(seed, epoch)`. The permutations are laid end to end and cut into global batches:
    a batch runs across the border of two epochs (of more, if it is larger than the dataset),
    so none is short and no sample is dropped. Process `rank` gets its slice of each.

    The global batch of a step is a function of `(seed, step)` alone. Hence the step is all
    there is to save: a run resumed with `start_step=k` sees what the unbroken run saw from
    step k on, with any number of processes or loader workers. For the same reason iterating
    again starts at `start_step` again, and how far a loader has read ahead does not matter.

    Pass it as `DataLoader(dataset, batch_sampler=EpochBatches(len(dataset), ...))`, or index
    tensors in memory with the batches. There is no `len`: the caller counts the steps.

    Args:
        dataset_size: number of samples, at least 1.
        batch_size: samples in a global batch, over all processes; a multiple of `world_size`.
        seed: 0 or more.
        rank: of this process, 0 to `world_size - 1`.
        world_size: number of processes.
        start_step: the step, counted from 0, of the first batch.

    Raises:
        UserError: if the dataset is empty or the batch cannot be shared evenly.
        ValueError: for any other argument out of its range.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if dataset_size < 1:
            raise UserError("the dataset has no samples: there is nothing to draw batches from")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size}: it counts from 0 to world_size - 1")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch size {batch_size} cannot be shared evenly by {world_size} process(es): "
                f"choose a positive multiple of {world_size}"
            )
        if seed < 0 or start_step < 0:
            raise ValueError(f"seed is {seed}, start_step {start_step}: both must be 0 or more")
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this process's `batch_size // world_size` indices of each step."""
        local_size = self.batch_size // self.world_size
        step = self.start_step
        while True:
            first = step * self.batch_size + self.rank * local_size
            yield self._draws(first, local_size)
            step += 1

    def global_batch(self, step: int) -> list[int]:
        """The `batch_size` indices that all processes together see in `step` (from 0)."""
        return self._draws(step * self.batch_size, self.batch_size)

    def _draws(self, first: int, count: int) -> list[int]:
        """The indices at positions `first` to `first + count - 1` of the endless stream."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, position = divmod(first + len(indices), self.dataset_size)
            missing = count - len(indices)
            indices += self._permutation_of(epoch)[position : position + missing].tolist()
        return indices

    def _permutation_of(self, epoch: int) -> np.ndarray:
        # The stream only moves forward, so one permutation at a time saves drawing a million
        # numbers for each batch.
        if epoch != self._epoch:
            # spawn_key is numpy's hash of several integers into one well-mixed seed.
            seed = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
            self._permutation = np.random.default_rng(seed).permutation(self.dataset_size)
            self._epoch = epoch
        return self._permutation
