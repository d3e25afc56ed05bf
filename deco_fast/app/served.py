"""The one model of a page, which its visitors share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from deco_fast.app.limits import Limits
from deco_fast.app.request import DrawRequest
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.models.card import ModelCard
from deco_fast.models.network import DeCoNetwork
from deco_fast.sampling.batch_size import default_batch_size
from deco_fast.sampling.engine import SamplingEngine

Item = TypeVar("Item")


@dataclass(frozen=True)
class Origin:
    """The options of `sample.py` that give the page's model.

    Attributes:
        checkpoint: the folder or file itself, not the run that it is the newest of; or hf:….
        weights: "ema" or "model".
        dtype: "fp32", "bf16", "fp16" or "fp8".
        matmul_precision: "highest" or "high".
        preset: a name in `PRESETS`, where one was given.
    """

    checkpoint: str
    weights: str = "ema"
    dtype: str = "fp32"
    matmul_precision: str = "highest"
    preset: str | None = None


class ServedModel:
    """A model, its text encoder, and the engine that was needed last.

    Args:
        model: on its device.
        card: image size and settings that the page begins with.
        origin: where it comes from.
        encoder: of a text model.
        limits: of one request.

    Attributes:
        is_closed: whether the page is being shut down.
    """

    def __init__(
        self,
        model: DeCoNetwork,
        card: ModelCard,
        origin: Origin,
        encoder: Qwen3TextEncoder | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model, self.card, self.origin, self.encoder = model, card, origin, encoder
        self.limits = limits or Limits()
        self.device: torch.device = model.patch_embedder.weight.device
        self._lock = threading.Lock()
        self._turn: object = None
        self.is_closed = False
        self._engine: SamplingEngine | None = None
        self._made_for: tuple[object, ...] = ()

    def batch_size(self, request: DrawRequest) -> int:
        """Images that are computed at once for a request."""
        return min(default_batch_size(self.device, request.height, request.width), request.num)

    def engine(self, request: DrawRequest) -> SamplingEngine:
        """One that draws a request; that of the request before, where it will do.

        Raises:
            torch.OutOfMemoryError: there is no memory for it.
        """
        size = self.batch_size(request)
        distinct = min(request.job.distinct, size)
        key = request.settings, request.height, request.width, size, distinct
        if self._engine is None or self._made_for != key:
            self._engine = None  # its memory is needed for the next one
            self._engine = SamplingEngine(
                self.model,
                request.settings,
                height=request.height,
                width=request.width,
                batch_size=size,
                fp8=self.origin.dtype == "fp8",
                distinct_conditions=distinct,
                encode_text=self.encoder,
            )
            self._made_for = key
        return self._engine

    def close(self) -> None:
        """Wait for the evaluation under way, and let no other follow: a thread that computes while
        Python ends takes the process down."""
        self.is_closed = True
        with self._lock:
            pass

    def in_turn(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, each made while nobody else uses the engine.

        The page's queue lets one request in at a time. A request that was stopped may still be in
        the middle of a step when the next one begins: it ends there.
        """
        turn = object()
        with self._lock:
            self._turn = turn
        while True:
            with self._lock:
                if self.is_closed or self._turn is not turn:
                    return
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
