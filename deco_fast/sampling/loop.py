"""From noise to images: the plain sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from deco_fast.guidance import guidance_active, guide
from deco_fast.models.card import SamplingSettings, check_sampling
from deco_fast.solvers import solve, time_grid

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), t (B,), condition (B, …)) → velocity (B, C, H, W)."""


@torch.no_grad()
def sample(
    model: VelocityModel,
    noise: Tensor,
    condition: Tensor | Sequence[int],
    uncondition: Tensor | Sequence[int] | int | None = None,
    *,
    steps: int = 100,
    solver: str = "euler",
    order: int = 2,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    time_shift: float = 1.0,
    progress: bool = False,
) -> Tensor:
    """Draw images by integrating the model's velocity from noise at t = 0 to t = 1.

    Args:
        model: `DeCo`, or any callable (x, t, condition) → velocity.
        noise: (B, C, H, W), standard normal.
        condition: (B, …), class labels (B,) for DeCo; these may be a list.
        uncondition: what takes the condition's place in the unconditional half; by default the
            null class of the model.
        steps: solver steps.
        solver: "euler", "heun" (two evaluations a step), "heun-pec" (one) or "adams".
        order: of "adams", 1 … 4.
        guidance_scale: 1 is no guidance; the unconditional half is then not computed.
        guidance_interval: (low, high); guidance acts for t in (low, high], with "adams" in
            (low, high), and outside of it the unconditional half is not computed.
        guidance_rescale: 0 … 1, see `guidance.guide`.
        time_shift: above 1 spends more steps near the noise.
        progress: show a bar with steps/s and remaining time.

    Returns:
        Images (B, C, H, W), about [−1, 1], float32 (float64 for float64 noise). State, guidance
        and solver arithmetic are in that dtype whatever the model's.

    Raises:
        ValueError: an argument is out of range, or there is no uncondition to be had.
    """
    check_sampling(
        SamplingSettings(
            solver=solver,
            order=order,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            time_shift=time_shift,
        )
    )
    times = time_grid(steps, time_shift)
    condition = torch.as_tensor(condition, device=noise.device)
    if condition.shape[:1] != noise.shape[:1]:
        raise ValueError(
            f"{len(noise)} noises but conditions of shape {tuple(condition.shape)}: one each"
        )
    closed_end = solver != "adams"
    guided_steps = guidance_scale != 1 and any(
        guidance_active(t, guidance_interval, closed_end) for t in times[:-1]
    )
    if guided_steps:
        if uncondition is None:
            uncondition = _null_class(model)
        uncondition = torch.as_tensor(uncondition, device=condition.device)
        both = torch.cat([uncondition.expand_as(condition), condition])

    x = noise.to(torch.promote_types(noise.dtype, torch.float32))

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        if guidance_scale == 1 or not guidance_active(step_start, guidance_interval, closed_end):
            return model(x, x.new_full((len(x),), t), condition).to(x.dtype)
        v = model(torch.cat([x, x]), x.new_full((2 * len(x),), t), both).to(x.dtype)
        unconditional, conditional = v.chunk(2)
        return guide(unconditional, conditional, guidance_scale, guidance_rescale)

    states = solve(velocity, x, times, solver, order)
    for x in tqdm(states, total=steps, desc="sampling", unit="step", disable=not progress):  # noqa: B007
        pass
    return x


def _null_class(model: VelocityModel) -> int:
    num_classes: int | None = getattr(getattr(model, "config", None), "num_classes", None)
    if num_classes is None:
        raise ValueError("guidance needs an uncondition: the model has no config.num_classes")
    return num_classes
