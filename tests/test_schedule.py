"""A run written down before its first step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deco_fast.models.card import SamplingSettings
from deco_fast.sampling import schedule as schedule_module
from deco_fast.sampling.schedule import schedule
from deco_fast.solvers import SOLVERS, Velocity, solve, time_grid


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_following_it_is_solving(solver: str, order: int, steps: int) -> None:
    settings = SamplingSettings(solver=solver, order=order, steps=steps, time_shift=2.0)
    x = torch.tensor([0.3, -1.2], dtype=torch.float64)
    *_, expected = solve(
        lambda x, t, _: torch.sin(3 * x) + t, x, time_grid(steps, 2.0), solver, order
    )
    velocities: list[torch.Tensor] = []
    for evaluation in schedule(settings):
        velocities.insert(0, torch.sin(3 * x) + evaluation.t)
        for weight, velocity in zip(evaluation.weights, velocities, strict=False):
            x = x + weight * velocity
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "order", "kept"), [("euler", 2, 1), ("adams", 3, 3), ("heun", 2, 2)]
)
def test_no_more_velocities_are_kept_than_are_used(solver: str, order: int, kept: int) -> None:
    settings = SamplingSettings(solver=solver, order=order, steps=9)
    assert {len(evaluation.weights) for evaluation in schedule(settings)} == {kept}


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_does_not_hold_every_place(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def watched(velocity: Velocity, *arguments: Any) -> Iterator[torch.Tensor]:
        def watch(x: torch.Tensor, t: float, step_start: float) -> torch.Tensor:
            seen.append(weakref.ref(x))
            held.append(sum(place() is not None for place in seen))
            return velocity(x, t, step_start)

        return solve(watch, *arguments)

    monkeypatch.setattr(schedule_module, "solve", watched)
    schedule(SamplingSettings(solver=solver, steps=40))
    assert max(held) <= 4


def test_guidance_follows_the_start_of_the_step() -> None:
    settings = SamplingSettings(
        solver="heun", steps=4, guidance_scale=2.0, guidance_interval=(0.2, 0.6)
    )
    # Two evaluations for each of the steps at 0, 0.25 and 0.5, one for the last.
    assert [e.guided for e in schedule(settings)] == [False, False, True, True, True, True, False]
    assert not any(e.guided for e in schedule(SamplingSettings(steps=4)))


def test_a_closed_end_is_open_for_adams() -> None:
    def guided(solver: str) -> list[bool]:
        settings = SamplingSettings(
            solver=solver, steps=4, guidance_scale=2.0, guidance_interval=(0.0, 0.5)
        )
        return [e.guided for e in schedule(settings)]

    assert guided("euler") == [False, True, True, False]
    assert guided("adams") == [False, True, False, False]
