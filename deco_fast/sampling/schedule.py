"""What a solver asks of the model, written down before the first step.

Every solver of `deco_fast.solvers` is linear in the velocities: from one evaluation of the model to
the next, the point x at which it is evaluated moves by a weighted sum of the newest velocities.
Times and weights do not depend on x, so a whole run is a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from deco_fast.guidance import check_interval, guidance_active
from deco_fast.models.card import SamplingSettings
from deco_fast.solvers import check_solver, solve, time_grid


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
        ValueError: solver, order, steps, time shift or guidance interval are out of range.
    """
    check_solver(settings.solver, settings.order)
    check_interval(settings.guidance_interval)
    times = time_grid(settings.steps, settings.time_shift)
    # The solver runs on coordinates: x is e₀, the velocity of evaluation i is eᵢ₊₁, so what it
    # computes from them is their weights.
    basis = torch.eye(2 * settings.steps + 2, dtype=torch.float64)
    calls: list[tuple[float, float]] = []
    places: list[Tensor] = []

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        calls.append((t, step_start))
        places.append(x)
        return basis[len(calls)]

    *_, end = solve(velocity, basis[0], times, settings.solver, settings.order)
    moves = [there - here for here, there in pairwise([*places, end])]
    newest_first = [move[1 : i + 2].flip(0) for i, move in enumerate(moves)]
    used = max(int(weights.nonzero().max()) + 1 for weights in newest_first)
    return [
        Evaluation(t, _guided(settings, step_start), _padded(weights, used))
        for (t, step_start), weights in zip(calls, newest_first, strict=True)
    ]


def _guided(settings: SamplingSettings, step_start: float) -> bool:
    closed_end = settings.solver != "adams"
    return settings.guidance_scale != 1 and guidance_active(
        step_start, settings.guidance_interval, closed_end
    )


def _padded(weights: Tensor, length: int) -> tuple[float, ...]:
    values = weights.tolist()
    return tuple((values + [0.0] * length)[:length])
