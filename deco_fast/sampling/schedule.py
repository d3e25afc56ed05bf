"""What a solver asks of the model, written down before the first step.

Every solver of `deco_fast.solvers` is linear in the velocities: from one evaluation of the model to
the next, the point x at which it is evaluated moves by a weighted sum of the newest velocities.
Times and weights do not depend on x, so a whole run is a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deco_fast.guidance import guidance_active
from deco_fast.models.card import SamplingSettings, check_sampling
from deco_fast.solvers import solve, time_grid


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model, and the move to the place of the next one, or to the end.

    Attributes:
        t: time, in [0, 1].
        guided: whether the unconditional half is evaluated too.
        weights: of this velocity and of those before it, newest first; x += Σ weight · velocity.
    """

    t: float
    guided: bool
    weights: tuple[float, ...]


def schedule(settings: SamplingSettings) -> list[Evaluation]:
    """All evaluations of a run, in order; the weights of all have one length.

    Raises:
        ValueError: a setting is out of range, or the times are too close to each other.
    """
    check_sampling(settings)
    times = time_grid(settings.steps, settings.time_shift)
    # The solver runs on coordinates: the velocity of evaluation i is eᵢ, x begins at zero, so what
    # it computes from them is their weights.
    size = 2 * settings.steps
    calls: list[tuple[float, float]] = []
    moves: list[list[float]] = []
    place = torch.zeros(size, dtype=torch.float64)

    def arrive(x: Tensor) -> None:
        nonlocal place
        move, place = x - place, x
        # Those not used are left out: there may be as many as steps, after each of the steps.
        oldest = int(move.nonzero().min())
        moves.append(move[oldest : len(calls)].flip(0).tolist())

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        if calls:
            arrive(x)
        calls.append((t, step_start))
        unit = torch.zeros(size, dtype=torch.float64)
        unit[len(calls) - 1] = 1
        return unit

    for x in solve(velocity, place, times, settings.solver, settings.order):
        end = x
    arrive(end)
    used = max(map(len, moves))
    return [
        Evaluation(t, _guided(settings, step_start), (*weights, *[0.0] * (used - len(weights))))
        for (t, step_start), weights in zip(calls, moves, strict=True)
    ]


def _guided(settings: SamplingSettings, step_start: float) -> bool:
    closed_end = settings.solver != "adams"
    return settings.guidance_scale != 1 and guidance_active(
        step_start, settings.guidance_interval, closed_end
    )
