"""CUDA graphs that own their workspaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deco_fast import recording as module
from deco_fast.recording import pool_bytes, recording


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order."""
    happened: list[str] = []

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        happened.append("begin")
        try:
            yield
        finally:
            happened.append("end")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(
        torch._C,
        "_cuda_clearCublasWorkspaces",
        lambda: happened.append("forget workspaces"),
        raising=False,
    )
    return happened


def test_workspaces_are_taken_within_the_recording_and_given_up_after_it(
    events: list[str],
) -> None:
    with recording(None, (0, 1), None):  # type: ignore[arg-type]
        events.append("compute")
    assert events == ["forget workspaces", "begin", "compute", "end", "forget workspaces"]


def test_also_after_one_that_fails(events: list[str]) -> None:
    with pytest.raises(RuntimeError), recording(None, (0, 1), None):  # type: ignore[arg-type]
        raise RuntimeError
    assert events == ["forget workspaces", "begin", "end", "forget workspaces"]


def test_the_memory_of_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"segment_pool_id": pool, "total_size": size}
        for pool, size in (((0, 0), 1), ((0, 1), 10), ((0, 1), 100), ((0, 2), 1000))
    ]
    monkeypatch.setattr(module.torch.cuda, "memory_snapshot", lambda: segments)
    assert pool_bytes((0, 1)) == 110


@pytest.mark.gpu
def test_a_graph_lives_on_when_others_give_up_their_workspaces() -> None:
    """As torch.compile's graphs do. Few rows of a deep product are what libraries split."""
    a, b = torch.randn(8, 8192, device="cuda"), torch.randn(8192, 64, device="cuda")
    expected = a @ b
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.mm(a, b)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, pool, stream):
        result = a @ b
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert pool_bytes(pool) > 0
    graph.replay()
    torch.testing.assert_close(result, expected)
