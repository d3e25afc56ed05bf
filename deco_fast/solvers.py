"""ODE solvers of dx/dt = v(x, t) from t = 0 (noise) to t = 1 (data); specification B.13.

A solver is a generator that yields the state after every step. It asks for velocities by
`velocity(x, t, step_start)`: the slope at (x, t), and the time at which the step began, which
alone decides whether guidance acts (as published, also for Heun's corrector).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.polynomial import polynomial
from torch import Tensor

from deco_fast.errors import UserError, nearest
from deco_fast.flow import shift_time

Velocity = Callable[[Tensor, float, float], Tensor]

MAX_ORDER = 4
"""Highest order of the Adams solver."""


def time_grid(steps: int, time_shift: float = 1.0, last_step: float | None = None) -> list[float]:
    """The steps + 1 times of a run, from 0 to 1.

    Evenly spaced from 0 to 1 − last_step (1/steps unless given), then 1, all shifted, and all
    rounded to float32 as published: an edge of the guidance interval may fall on a time.

    Raises:
        ValueError: steps below 1, last_step outside (0, 1], time_shift not positive, or a time is
            not above the one before, as with a time_shift far from 1 (a `UserError`).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    last_step = 1 / steps if last_step is None else last_step
    if not 0 < last_step <= 1:
        raise ValueError(f"last step must be in (0, 1], not {last_step}")
    too_close = UserError(
        f"{steps} steps with a time shift of {time_shift:g} are too close to each other for "
        "numbers of 32 bits: choose a time shift nearer to 1, or fewer steps"
    )
    if steps > 2**24:
        raise too_close
    grid = torch.linspace(0, 1 - last_step, steps, dtype=torch.float32)
    grid = torch.cat([grid, grid.new_ones(1)])
    times: list[float] = shift_time(grid, time_shift).tolist()
    if not all(t < t_next for t, t_next in pairwise(times)):
        raise too_close
    return times


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """x ← x + Δt·v(x, t); one evaluation a step."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t, t)
        yield x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Trapezoidal corrector after an Euler predictor; two evaluations a step, one in the last."""
    for t, t_next in pairwise(times):
        slope = velocity(x, t, t)
        if t_next < times[-1]:
            predicted = x + (t_next - t) * slope
            slope = (slope + velocity(predicted, t_next, t)) / 2
        x = x + (t_next - t) * slope
        yield x


def heun_pec(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Heun that predicts with the previous step's corrector slope; one evaluation a step.

    That slope was taken at the predicted point, not at the corrected one. The first step
    takes two evaluations and the last none.
    """
    slope = velocity(x, times[0], times[0])
    for t, t_next in pairwise(times):
        dt = t_next - t
        if t_next < times[-1]:
            corrector = velocity(x + dt * slope, t_next, t)
            x = x + dt * (slope + corrector) / 2
            slope = corrector
        else:
            x = x + dt * slope
        yield x


def adams_coefficients(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Adams–Bashforth weights for the slopes at `nodes`, oldest first, that sum to 1.

    The integral over [start, end] of the polynomial through the slopes is (end − start) times
    their weighted sum. In float64: float32 loses up to 9e-4 at order 4 (specification D8).
    """
    scaled = (np.asarray(nodes, dtype=np.float64) - start) / (end - start)
    weights = []
    for i, node in enumerate(scaled):
        others = np.delete(scaled, i)
        lagrange = polynomial.polyfromroots(others) / np.prod(node - others)
        weights.append(float(polynomial.polyval(1.0, polynomial.polyint(lagrange))))
    return weights


def adams(
    velocity: Velocity, x: Tensor, times: Sequence[float], order: int = 2
) -> Iterator[Tensor]:
    """Adams–Bashforth on an uneven grid; one evaluation a step, orders 1 (Euler) to 4."""
    slopes: list[Tensor] = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        slopes = [*slopes, velocity(x, t, t)][-order:]
        weights = adams_coefficients(times[i + 1 - len(slopes) : i + 1], t, t_next)
        step = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        x = x + (t_next - t) * step
        yield x


SOLVERS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "euler": euler,
    "heun": heun,
    "heun-pec": heun_pec,
    "adams": adams,
}


def check_solver(solver: str, order: int = 2) -> None:
    """Raise ValueError unless the solver exists and the order is 1 … 4."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver '{solver}'{nearest(solver, SOLVERS)}")
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be 1 … {MAX_ORDER}, not {order}")


def solve(
    velocity: Velocity, x: Tensor, times: Sequence[float], solver: str = "euler", order: int = 2
) -> Iterator[Tensor]:
    """The states after every step of the named solver; `order` is for "adams" alone.

    Raises:
        ValueError: the solver does not exist or the order is out of range.
    """
    check_solver(solver, order)
    if solver == "adams":
        return adams(velocity, x, times, order)
    return SOLVERS[solver](velocity, x, times)
