"""Recording CUDA graphs that own all the memory that they use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph,
    pool: Any,
    stream: torch.cuda.Stream,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """As `torch.cuda.graph`, and the workspaces of products come from the graph's pool.

    Torch keeps a workspace for each stream, and gives all of them up where another graph is
    recorded, by torch.compile's "reduce-overhead" for one. A graph that had recorded the address
    of one that was there before would then write to memory that is not its own.
    """
    _forget_workspaces()
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode=capture_error_mode):
            yield
    finally:
        # What is computed without the graph takes others: its pool's are the graph's alone.
        _forget_workspaces()


def _forget_workspaces() -> None:
    # Torch's own name for it, and absent from builds without CUDA.
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()


def pool_bytes(pool: Any) -> int:
    """Bytes of the device's memory that a pool of graphs holds."""
    return sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) == tuple(pool)
    )
