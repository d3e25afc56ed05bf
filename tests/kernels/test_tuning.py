"""The choice of tiles by measurement, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

import triton

from deco_fast.errors import UserError
from deco_fast.kernels import tuning
from deco_fast.kernels.pixel_decoder.gpu_tiles import Shape, candidates


class Tile(NamedTuple):
    pixels: int
    warps: int


SMALL, MEDIUM, LARGE = Tile(32, 4), Tile(64, 4), Tile(128, 8)


class Clock:
    """Gives every tile a time, and notes which it was asked for."""

    def __init__(self, times: dict[Tile, float]) -> None:
        self.times = times
        self.ran: list[Tile] = []

    def choose(self, candidates: list[Tile], problem: str = "forward", gpu: str = "H200") -> Tile:
        def run(tile: Tile) -> None:
            self.ran.append(tile)

        def measure(call: Callable[[], object]) -> float:
            call()
            return self.times[self.ran[-1]]

        return tuning.fastest(problem, gpu, candidates, run, measure)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "cache" / "tiles.json")
    monkeypatch.setattr(tuning, "_chosen", {})
    yield


def test_the_fastest_is_chosen_and_measured_once() -> None:
    clock = Clock({SMALL: 3.0, MEDIUM: 1.0, LARGE: 2.0})
    assert clock.choose([SMALL, MEDIUM, LARGE]) == MEDIUM
    assert clock.ran == [SMALL, MEDIUM, LARGE]
    assert clock.choose([SMALL, MEDIUM, LARGE]) == MEDIUM
    assert len(clock.ran) == 3


def test_a_later_process_reads_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock({SMALL: 3.0, MEDIUM: 1.0}).choose([SMALL, MEDIUM])
    monkeypatch.setattr(tuning, "_chosen", {})
    clock = Clock({})
    choice = clock.choose([SMALL, MEDIUM])
    assert choice == MEDIUM
    assert isinstance(choice, Tile)
    assert clock.ran == []


@pytest.mark.parametrize("other", [{"problem": "backward"}, {"gpu": "A100"}])
def test_every_problem_and_gpu_has_its_own(other: dict[str, str]) -> None:
    Clock({SMALL: 3.0, MEDIUM: 1.0}).choose([SMALL, MEDIUM])
    assert Clock({SMALL: 1.0, MEDIUM: 3.0}).choose([SMALL, MEDIUM], **other) == SMALL
    assert Clock({}).choose([SMALL, MEDIUM]) == MEDIUM


def test_another_version_of_triton_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock({SMALL: 3.0, MEDIUM: 1.0}).choose([SMALL, MEDIUM])
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(triton, "__version__", "0.0")
    assert Clock({SMALL: 1.0, MEDIUM: 3.0}).choose([SMALL, MEDIUM]) == SMALL


def test_a_choice_that_is_no_candidate_any_more_is_made_again() -> None:
    Clock({SMALL: 3.0, MEDIUM: 1.0}).choose([SMALL, MEDIUM])
    assert Clock({SMALL: 3.0, LARGE: 2.0}).choose([SMALL, LARGE]) == LARGE


@pytest.mark.parametrize("content", ["", "[1", "[]"])
def test_a_damaged_file_is_as_none(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock({SMALL: 3.0, MEDIUM: 1.0}).choose([SMALL, MEDIUM])
    tuning._file().write_text(content)
    monkeypatch.setattr(tuning, "_chosen", {})
    assert Clock({SMALL: 1.0, MEDIUM: 3.0}).choose([SMALL, MEDIUM]) == SMALL


def test_what_the_gpu_cannot_hold_is_not_chosen() -> None:
    def run() -> None:
        raise tuning.OutOfResources(200, 100, "shared memory")

    def do_bench(run: Callable[[], object], **_: Any) -> float:
        run()
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.testing, "do_bench", do_bench)
        assert tuning.milliseconds(run) == float("inf")
        assert tuning.milliseconds(lambda: None) == 1.0


@pytest.mark.parametrize(("value", "on"), [(None, False), ("0", False), ("1", True)])
def test_the_environment_variable(
    value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DECO_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("DECO_AUTOTUNE", value)
    assert tuning.is_on() == on


def test_another_value_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECO_AUTOTUNE", "yes")
    with pytest.raises(UserError, match="DECO_AUTOTUNE=yes: set 1"):
        tuning.is_on()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 32, 64])
def test_candidates_begin_with_the_tables_choice(
    channels: int, dtype: torch.dtype, capability: int
) -> None:
    shape = Shape(channels, 3, 16, dtype)
    forward, backward = (
        candidates(tile)
        for tile in (shape.forward_tile(capability), shape.backward_tile(capability))
    )
    assert forward[0] == shape.forward_tile(capability)
    assert backward[0] == shape.backward_tile(capability)
    for tiles in (forward, backward):
        assert len(set(tiles)) == len(tiles) > 1
        assert all(16 <= tile.pixels <= 256 for tile in tiles)
