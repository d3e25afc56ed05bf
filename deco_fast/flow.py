"""Linear-path flow matching: x_t = t·x + (1 − t)·noise, from noise at t = 0 to data at t = 1.

Specification B.7.
"""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from deco_fast.errors import nearest

TimestepDistribution = Literal["lognorm", "uniform"]
TimestepWeight = Literal["constant", "inverse_sigma2", "snr", "minsnr", "maxsnr"]

Time = TypeVar("Time", float, Tensor)


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t·x + (1 − t)·noise for images x and noise (B, …) and times t (B,) in [0, 1].

    Raises:
        ValueError: the images are integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"images must be floating-point numbers about [−1, 1], not {x.dtype}")
    t = _column(t, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = x − noise, the network's target."""
    return x - noise


VELOCITY_TIME_FLOOR = 0.05
"""The least 1 − t that an image is divided by on its way to a velocity."""


def image_to_velocity(image: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """(image − x_t) / max(1 − t, 0.05): the velocity that leads from x_t to the image (JiT, B.7).

    Args:
        image: clean images (B, …), predicted or real.
        x_t: noisy images (B, …), in the dtype that the difference is wanted in.
        t: times (B,) in [0, 1].
    """
    return (image - x_t) / (1 - _column(t, x_t)).clamp(min=VELOCITY_TIME_FLOOR)


def shift_time(t: Time, time_shift: float) -> Time:
    """t / (t + (1 − t)·time_shift): above 1 towards noise, below 1 towards data, 0 and 1 fixed.

    Raises:
        ValueError: time_shift is not positive.
    """
    if not time_shift > 0:
        raise ValueError(f"time shift must be positive, not {time_shift}")
    return t / (t + (1 - t) * time_shift)


def sample_timesteps(
    batch_size: int,
    *,
    distribution: TimestepDistribution = "lognorm",
    time_shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times (B,), float32: sigmoid of a standard normal, or uniform, then shifted.

    Raises:
        ValueError: the distribution has no such name, or time_shift is not positive.
    """
    if distribution == "lognorm":
        t = torch.randn(batch_size, generator=generator, device=device).sigmoid()
    elif distribution == "uniform":
        t = torch.rand(batch_size, generator=generator, device=device)
    else:
        raise ValueError(
            f"unknown timestep distribution '{distribution}'"
            f"{nearest(distribution, get_args(TimestepDistribution))}"
        )
    return shift_time(t, time_shift)


def timestep_weight(name: TimestepWeight, t: Tensor) -> Tensor:
    """Weight (B,) of the flow-matching term at times t (B,); α = t, σ = 1 − t.

    constant 1, inverse_sigma2 1/σ², snr α/σ, and as published (where the two names are the
    other way round than usual) minsnr max(α/σ, 5) and maxsnr min(α/σ, 5).

    Raises:
        ValueError: there is no weight of that name.
    """
    sigma = (1 - t).clamp(min=torch.finfo(t.dtype).tiny)
    weights = {
        "constant": lambda: torch.ones_like(t),
        "inverse_sigma2": lambda: 1 / sigma**2,
        "snr": lambda: t / sigma,
        "minsnr": lambda: (t / sigma).clamp(min=5),
        "maxsnr": lambda: (t / sigma).clamp(max=5),
    }
    if name not in weights:
        raise ValueError(f"unknown timestep weight '{name}'{nearest(name, weights)}")
    return weights[name]()
