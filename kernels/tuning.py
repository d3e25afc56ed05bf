"""Tiles by measurement instead of from a table: DECO_AUTOTUNE=1.

The first call of a kernel on a GPU with a new shape times every candidate and notes the fastest,
for this process and, in a file of Triton's cache folder, for later ones. `triton.autotune` does the
same for a kernel's own constants, but here buffers and the number of launches depend on the tile.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from deco_fast.errors import UserError

_VARIABLE = "DECO_AUTOTUNE"

Tile = TypeVar("Tile", bound=tuple[object, ...])

_chosen: dict[tuple[str, str], tuple[object, ...]] = {}


def is_on() -> bool:
    """Whether tiles are to be measured.

    Raises:
        UserError: the environment variable DECO_AUTOTUNE is neither 0 nor 1.
    """
    value = os.environ.get(_VARIABLE, "0")
    if value not in ("0", "1"):
        raise UserError(
            f"{_VARIABLE}={value}: set 1 (measure tiles at first use) or 0 (the default)"
        )
    return value == "1"


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU; infinity where the kernel or its buffers do not fit."""
    try:
        return float(triton.testing.do_bench(run, return_mode="median"))
    except (OutOfResources, PTXASError, torch.OutOfMemoryError):
        return float("inf")


def fastest(
    problem: str,
    gpu: str,
    candidates: Sequence[Tile],
    run: Callable[[Tile], object],
    measure: Callable[[Callable[[], object]], float] = milliseconds,
) -> Tile:
    """The candidate that runs in the least time; of equals, and if none runs at all, the first.

    Args:
        problem: what is computed, by all that the choice may depend on but the GPU.
        gpu: its name.
        candidates: the table's choice first.
        run: computes the problem with a candidate, and may do so many times.
        measure: gives the time of a call.
    """
    if (best := known(problem, gpu, candidates)) is not None:
        return best
    times = [measure(functools.partial(run, candidate)) for candidate in candidates]
    best = candidates[times.index(min(times))]
    _chosen[problem, gpu] = best
    _write({**_read(), _entry(problem, gpu): list(best)})
    return best


def known(problem: str, gpu: str, candidates: Sequence[Tile]) -> Tile | None:
    """The candidate that `fastest` chose before, here or in an earlier process."""
    key = problem, gpu
    before = _chosen.get(key) or _read().get(_entry(*key))
    for candidate in candidates:
        if before is not None and tuple(before) == tuple(candidate):
            _chosen[key] = candidate
            return candidate
    return None


def _entry(problem: str, gpu: str) -> str:
    return f"{gpu}, triton {triton.__version__}: {problem}"


def _file() -> Path:
    return Path(triton.knobs.cache.dir, "deco-fast-tiles.json")


def _read() -> dict[str, list[object]]:
    try:
        content = json.loads(_file().read_text())
    except (OSError, ValueError):  # not there yet, or half of another program's work
        return {}
    return content if isinstance(content, dict) else {}


def _write(tiles: dict[str, list[object]]) -> None:
    """Replace the file at once, so that no process reads half of it."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(tiles, file, indent=1)
        os.replace(file.name, path)
    except OSError:  # a read-only cache: the next process measures again
        return
