"""The path from noise to data, and the times at which it is learned (specification B.7)."""

from __future__ import annotations

import math

import pytest
import torch
from golden import metadata, relative_error, tensors
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from deco_fast.flow import (
    interpolate,
    sample_timesteps,
    shift_time,
    timestep_weight,
    velocity,
)

times = st.floats(0, 1, width=32)
shifts = st.floats(0.05, 20)

TRAINERS = [
    "trainer_deco_c2i_lognorm",
    "trainer_deco_c2i_uniform_shift2_q75_truncfeat",
    "trainer_deco_c2i_nonsquare_maxsnr",
    "trainer_deco_t2i_lognorm_shift4",
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the path -------------------------------------------------------------------------------


def test_the_path_runs_from_noise_to_data() -> None:
    x, noise = torch.randn(2, 3, 3, 4, 5, generator=generator())
    assert torch.equal(interpolate(x, noise, torch.zeros(3)), noise)
    assert torch.equal(interpolate(x, noise, torch.ones(3)), x)


def test_each_image_has_its_own_time() -> None:
    x, noise = torch.randn(2, 3, 3, 4, 5, generator=generator())
    t = torch.tensor([0.1, 0.5, 0.9])
    mixed = interpolate(x, noise, t)
    for i in range(3):
        assert torch.allclose(mixed[i], t[i] * x[i] + (1 - t[i]) * noise[i], atol=1e-6)


def test_velocity_is_the_slope_of_the_path() -> None:
    x, noise = torch.randn(2, 3, 3, 4, 5, generator=generator(), dtype=torch.float64)
    t, step = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 0.01
    slope = (interpolate(x, noise, t + step) - interpolate(x, noise, t)) / step
    assert relative_error(velocity(x, noise), slope) <= 1e-12


def test_the_path_keeps_the_images_dtype() -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    assert interpolate(x, x, torch.rand(2)).dtype == torch.bfloat16


# --- times ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
def test_times_of_a_training_step_equal_golden(name: str) -> None:
    golden, meta = tensors(name), metadata(name)
    t = golden["in.t_raw"].sigmoid() if meta["lognorm_t"] else golden["in.t_raw"]
    t = shift_time(t, meta["kwargs"].get("timeshift", 1.0))
    assert relative_error(t, golden["t"]) <= 1e-6


@given(times, times, shifts)
def test_the_shift_is_monotone_and_keeps_the_ends(a: float, b: float, time_shift: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= shift_time(low, time_shift) <= shift_time(high, time_shift) <= 1 + 1e-12
    assert shift_time(0.0, time_shift) == 0
    assert shift_time(1.0, time_shift) == 1


@given(times, shifts, shifts)
def test_shifts_compose_by_their_product(t: float, a: float, b: float) -> None:
    assert shift_time(shift_time(t, a), b) == pytest.approx(shift_time(t, a * b), abs=1e-12)
    assert shift_time(shift_time(t, a), 1 / a) == pytest.approx(t, abs=1e-12)


def test_a_shift_above_one_goes_towards_noise() -> None:
    t = torch.linspace(0, 1, 101)[1:-1]
    assert (shift_time(t, 2.0) < t).all() and (shift_time(t, 0.5) > t).all()
    assert torch.equal(shift_time(t, 1.0), t)
    assert shift_time(0.5, 3.0) == pytest.approx(0.25)


@pytest.mark.parametrize("time_shift", [1.0, 4.0])
def test_lognorm_times_have_a_normal_logit(time_shift: float) -> None:
    t = sample_timesteps(20_000, time_shift=time_shift, generator=generator())
    assert t.dtype == torch.float32 and t.shape == (20_000,)
    assert t.min() > 0 and t.max() < 1
    # t/(1 − t) is divided by the shift, so that the logit moves by its logarithm.
    logits = t.double().logit() + math.log(time_shift)
    assert stats.kstest(logits.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("time_shift", [1.0, 4.0])
def test_uniform_times_are_uniform_before_the_shift(time_shift: float) -> None:
    t = sample_timesteps(
        20_000, distribution="uniform", time_shift=time_shift, generator=generator()
    )
    unshifted = shift_time(t.double(), 1 / time_shift)
    assert stats.kstest(unshifted.numpy(), "uniform").pvalue > 0.01


def test_a_generator_decides_the_times() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample_timesteps(8, generator=generator(1))
    assert torch.equal(first, sample_timesteps(8, generator=generator(1)))
    assert not torch.equal(first, sample_timesteps(8, generator=generator(2)))
    assert torch.equal(torch.get_rng_state(), state)


# --- weights --------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    t = torch.tensor([0.0, 0.5, 0.8, 0.9], dtype=torch.float64)
    expected = {
        "constant": [1, 1, 1, 1],
        "inverse_sigma2": [1, 4, 25, 100],
        "snr": [0, 1, 4, 9],
        # As published: the names are the other way round than usual.
        "minsnr": [5, 5, 5, 9],
        "maxsnr": [0, 1, 4, 5],
    }
    for name, values in expected.items():
        weight = timestep_weight(name, t)  # type: ignore[arg-type]
        assert weight.shape == t.shape
        assert torch.allclose(weight, torch.tensor(values, dtype=torch.float64)), name


def test_a_clipped_weight_is_finite_at_the_data() -> None:
    one = torch.ones(1)
    assert timestep_weight("maxsnr", one) == 5
    assert timestep_weight("constant", one) == 1


# --- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize("time_shift", [0.0, -1.0, math.nan])
def test_a_shift_must_be_positive(time_shift: float) -> None:
    with pytest.raises(ValueError, match="time shift must be positive"):
        shift_time(0.5, time_shift)
    with pytest.raises(ValueError, match="time shift must be positive"):
        sample_timesteps(2, time_shift=time_shift)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'lognormal'.*'lognorm'"):
        sample_timesteps(2, distribution="lognormal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'min_snr'.*'minsnr'"):
        timestep_weight("min_snr", torch.zeros(1))  # type: ignore[arg-type]


def test_images_of_integers_are_refused() -> None:
    noise = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"floating-point numbers .*, not torch\.uint8"):
        interpolate(noise.to(torch.uint8), noise, torch.rand(2))
