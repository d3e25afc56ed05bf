"""Classifier-free guidance: how velocities combine, and where (specification B.13, D6)."""

from __future__ import annotations

import math

import pytest
import torch
from golden import document, relative_error, tensors

from deco_fast.guidance import check_interval, guidance_active, guide
from deco_fast.solvers import time_grid


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    unconditional = torch.randn(3, 3, 8, 8, generator=rng)
    scale = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    return unconditional, 0.3 + scale * torch.randn(3, 3, 8, 8, generator=rng)


def spread(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).std(dim=1)


def test_guided_velocity_equals_golden() -> None:
    golden = tensors("samplers")
    unconditional, conditional = golden["guidance.in"].chunk(2)
    guided = guide(unconditional, conditional, 2.5)
    assert relative_error(guided, golden["guidance.simple_2.5"]) <= 1e-6


def test_scales_zero_and_one_are_the_two_velocities() -> None:
    unconditional, conditional = pair()
    assert torch.allclose(guide(unconditional, conditional, 0.0), unconditional)
    assert torch.allclose(guide(unconditional, conditional, 1.0), conditional, atol=1e-6)


def test_full_rescale_gives_every_image_the_conditional_spread() -> None:
    unconditional, conditional = pair()
    plain = guide(unconditional, conditional, 4.0)
    rescaled = guide(unconditional, conditional, 4.0, rescale=1.0)
    assert torch.allclose(spread(rescaled), spread(conditional), rtol=1e-5)
    assert not torch.allclose(spread(plain), spread(conditional), rtol=0.1)
    # Lin et al. (2023), equation 15: the whole velocity is multiplied, its mean included.
    ratio = (spread(conditional) / spread(plain)).view(-1, 1, 1, 1)
    assert torch.allclose(rescaled, ratio * plain, atol=1e-5)


def test_rescale_blends_linearly() -> None:
    unconditional, conditional = pair()
    plain, half, full = (guide(unconditional, conditional, 4.0, r) for r in (0.0, 0.5, 1.0))
    assert torch.equal(plain, guide(unconditional, conditional, 4.0))
    assert torch.allclose(half, (plain + full) / 2, atol=1e-5)


@pytest.mark.parametrize(("kind", "closed_end"), [("euler", True), ("adamlm", False)])
def test_edges_equal_golden(kind: str, closed_end: bool) -> None:
    table = document("samplers_meta")["guidance_scale_used_per_call_t0_.25_.5_.75"][kind]
    assert len(table) == 3
    for interval, scales in table.items():
        low, high = map(float, interval.strip("[]").split(","))
        active = [guidance_active(t, (low, high), closed_end) for t in (0, 0.25, 0.5, 0.75)]
        assert active == [scale != 1 for scale in scales], interval


def test_the_interval_is_open_below_and_closed_above() -> None:
    assert not guidance_active(0.2, (0.2, 0.8), closed_end=True)
    assert guidance_active(0.8, (0.2, 0.8), closed_end=True)
    assert not guidance_active(0.8, (0.2, 0.8), closed_end=False)
    assert not guidance_active(0.5, (0.5, 0.5), closed_end=True)


def test_edges_are_compared_in_float32() -> None:
    # In float64 the rounded 0.3 is greater than 0.3, in float32 it is the same.
    rounded = torch.tensor(0.3).item()
    assert rounded > 0.3
    assert not guidance_active(rounded, (0.3, 1.0), closed_end=True)
    just_above = math.nextafter(0.7, 1)
    assert guidance_active(just_above, (0.1, 0.7), closed_end=True)


@pytest.mark.parametrize("steps", [10, 25, 50, 100, 250])
@pytest.mark.parametrize("time_shift", [1.0, 3.0])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.1, 1.0)])
def test_published_settings_are_guided_where_float32_grids_were(
    steps: int, time_shift: float, interval: tuple[float, float]
) -> None:
    published = torch.linspace(0, 1 - 1 / steps, steps)
    published = published / (published + (1 - published) * time_shift)
    times = time_grid(steps, time_shift)[:-1]
    for closed_end in (True, False):
        upper = published <= interval[1] if closed_end else published < interval[1]
        expected = (published > interval[0]) & upper
        active = [guidance_active(t, interval, closed_end) for t in times]
        assert active == expected.tolist()
    assert not expected[0] and expected[-1]


@pytest.mark.parametrize(
    "interval", [(0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0), (0.0, math.nan)]
)
def test_an_impossible_interval_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"guidance interval \(.*\) must"):
        check_interval(interval)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.1, 1.0), (0.5, 0.5)])
def test_a_possible_interval_is_not(interval: tuple[float, float]) -> None:
    check_interval(interval)
