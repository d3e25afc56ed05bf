"""The targets of REPA for a batch: from the frozen encoder, or from what it said before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deco_fast.alignment.cache import DTYPE, FeatureCache
from deco_fast.transfer import to_device

if TYPE_CHECKING:
    from deco_fast.alignment.dinov2 import DINOv2

# Checksums and copies run outside of Python's lock, so threads read side by side.
_READERS = 4


class Features:
    """The frozen encoder's features of a batch.

    With a cache, the features of images met before are read. The others are rounded as the cache
    rounds, so that a training is the same with a full cache and with an empty one, and written
    while the training goes on.

    Args:
        encoder: on the device of the training.
        cache: of the data set's samples.
        damaged: (images,) bool in shared memory, set by the loader before a batch comes: others
            stand in for these images, whose features are theirs no more than the pixels are.
    """

    def __init__(
        self, encoder: DINOv2, cache: FeatureCache | None = None, damaged: Tensor | None = None
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self._damaged = damaged
        self._readers = ThreadPoolExecutor(_READERS) if cache is not None else None
        self._writer = ThreadPoolExecutor(1) if cache is not None else None
        self._writing: Future[None] | None = None

    @property
    def channels(self) -> int:
        """Of a token; 768 for DINOv2-B."""
        return self.encoder.feature_size

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Features (B, N, channels), float32.

        Args:
            images: (B, 3, H, W) in [−1, 1], on the device.
            indices: (B,) int64 on the CPU, of the samples in the data set.
        """
        if self.cache is None or self._readers is None:
            return self.encoder(images)
        numbers = indices.tolist()
        kept = [self._is_kept(number) for number in numbers]
        known = list(self._readers.map(self._read, numbers, kept))
        found = [entry for entry in known if entry is not None]
        if len(found) == len(known):
            return to_device(torch.stack(found), images.device).float()
        # All of them: another batch size would be compiled anew.
        features = self.encoder(images).to(DTYPE)
        missing = [i for i, entry in enumerate(known) if entry is None and kept[i]]
        if missing:
            rows = to_device(torch.tensor(missing), images.device)
            self._write([numbers[i] for i in missing], features[rows])
        if found:
            present = torch.tensor([i for i, entry in enumerate(known) if entry is not None])
            rows = to_device(present, images.device)
            features[rows] = to_device(torch.stack(found), images.device)
        return features.float()

    def compile(self) -> None:
        """Compile the encoder with torch.compile, at its next call."""
        self.encoder.compile()

    def flush(self) -> None:
        """Wait until everything computed so far is in the cache."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def describe(self) -> str:
        """Channels and cache, for people."""
        text = f"REPA with DINOv2 of {self.channels} channels"
        if self.cache is None:
            return text
        cache = self.cache
        return (
            f"{text}, features kept in {cache.path}: {cache.size / 2**30:.3g} GiB when full, "
            f"{cache.filled / cache.count:.0%} filled"
        )

    def _is_kept(self, number: int) -> bool:
        # A sample's mirror image comes after all images.
        return self._damaged is None or not self._damaged[number % len(self._damaged)]

    def _read(self, number: int, kept: bool) -> Tensor | None:
        assert self.cache is not None
        return self.cache.read(number) if kept else None

    def _write(self, numbers: Sequence[int], features: Tensor) -> None:
        assert self.cache is not None and self._writer is not None
        self.flush()  # one batch at a time is under way: memory stays bounded
        self._writing = self._writer.submit(self.cache.write, numbers, features)
