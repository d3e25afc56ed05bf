"""The AdaLN modulations of a whole run, computed ahead of the sampling loop.

They depend on the time and the class alone, and their weights are a third of DeCo's parameters
(223 of 682 million in DeCo-XL): a loop that computes them at each step reads that third each time
for a few rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_fast.models.deco import DeCo
from deco_fast.models.dit import DiTBlock
from deco_fast.models.prepared import fold_norms


class ModulationTable:
    """The modulations of some evaluations in a row, for some classes.

    Args:
        model: whose modulations.
        times: (E,), of all evaluations of a run.
        max_labels: distinct classes that a call of `fill` may bring.
        max_bytes: of memory for the table; it then holds fewer evaluations at a time, at least one.

    Attributes:
        values: (evaluations, max_labels, depth, 6, D), as prepared blocks take them.
        time_embedding: (E, D), what the decoder's condition adds to the tokens.
        span: evaluations that the table holds at a time.
    """

    def __init__(self, model: DeCo, times: Tensor, max_labels: int, max_bytes: int) -> None:
        config = model.config
        self._model = model
        self.time_embedding: Tensor = model.timestep_embedder(times)
        row = config.depth * 6 * config.hidden_size
        size = max_labels * row * self.time_embedding.element_size()
        self.span = max(1, min(len(times), max_bytes // size))
        self.values = self.time_embedding.new_empty(
            self.span, max_labels, config.depth, 6, config.hidden_size
        )
        self._held: tuple[int, tuple[int, ...]] | None = None

    def fill(self, start: int, labels: Sequence[int]) -> None:
        """Hold the evaluations start … start + span − 1 for these classes, in their order."""
        if self._held == (start, tuple(labels)):
            return
        device = self.values.device
        y = torch.tensor(labels).to(device, non_blocking=True)
        temb = self.time_embedding[start : start + self.span, None]
        condition = F.silu(temb + self._model.class_embedder(y))
        for i, block in enumerate(self._model.blocks):
            assert isinstance(block, DiTBlock)
            modulation = fold_norms(block.modulation(condition), block)
            self.values[: len(condition), : len(labels), i] = modulation
        self._held = start, tuple(labels)
