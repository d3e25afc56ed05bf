"""The solvers, their time grid, and the sampling loop around them (specification B.13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from golden import document, relative_error, tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deco_fast import DeCo, DeCoConfig, sample
from deco_fast.errors import UserError
from deco_fast.flow import image_to_velocity
from deco_fast.guidance import guidance_active, guide
from deco_fast.solvers import adams_coefficients, check_solver, solve, time_grid

# The golden name of a run's kind; solver and order.
KINDS = {
    "euler": ("euler", 2),
    "heun_exact": ("heun", 2),
    "heun_pec": ("heun-pec", 2),
    "adamlm1": ("adams", 1),
    "adamlm2": ("adams", 2),
    "adamlm3": ("adams", 3),
    "adamlm4": ("adams", 4),
}


@dataclass
class Setting:
    """The settings of one golden run, the same for all kinds."""

    time_shift: float
    steps: int
    guidance_scale: float
    interval: tuple[float, float]

    def name(self, kind: str) -> str:
        low, high = self.interval
        return f"{kind}.ts{self.time_shift}.n{self.steps}.g{self.guidance_scale}.i{low}-{high}"


SETTINGS = [
    Setting(time_shift, steps, scale, interval)
    for time_shift in (1.0, 3.0)
    for steps, scale, interval in (
        (5, 3.2, (0.1, 1.0)),
        (10, 1.0, (0.0, 1.0)),
        (10, 3.2, (0.1, 1.0)),
        (10, 3.2, (0.25, 0.65)),
        (10, 4.0, (0.0, 1.0)),
        (25, 3.2, (0.1, 1.0)),
    )
]


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def toy_network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The velocity of all golden runs: sin(x)·(1 + t) + 0.1·y."""
    return x.sin() * (1 + _column(t, x)) + 0.1 * _column(y, x)


@dataclass
class Recorder:
    """A network that notes when it was called, and with how many images."""

    network: Callable[[Tensor, Tensor, Tensor], Tensor] = toy_network
    times: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    conditions: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert x.shape[0] == t.shape[0] == y.shape[0]
        assert (t == t[0]).all()
        self.times.append(t[0].item())
        self.batch_sizes.append(len(x))
        self.conditions.append(y)
        return self.network(x, t, y)


def assert_golden_times(actual: list[float], expected: list[float]) -> None:
    # The golden times are rounded to 1e-7.
    assert actual == pytest.approx(expected, abs=2e-7)


# --- golden runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name("")[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_trajectories_on_the_golden_grid(kind: str, setting: Setting) -> None:
    """On the same times, float64 leaves no room for another method: 1e-12."""
    golden, (solver, order) = tensors("samplers"), KINDS[kind]
    run, noise = setting.name(kind), golden["noise"]

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        times = x.new_full((len(x),), t)
        conditional = toy_network(x, times, golden["cond"])
        if not guidance_active(step_start, setting.interval, closed_end=solver != "adams"):
            return conditional
        unconditional = toy_network(x, times, golden["uncond"])
        return guide(unconditional, conditional, setting.guidance_scale)

    states = list(solve(velocity, noise, golden[f"{run}.timesteps"].tolist(), solver, order))
    assert len(states) == setting.steps
    # The published Adams takes its coefficients in float32 (D8): its float64 twin is the oracle.
    exact = "f64coeff" if solver == "adams" else "f64"
    assert relative_error(states[-1], golden[f"{exact}.{run}.x"]) <= 1e-12
    if solver != "adams":
        assert relative_error(states[0], golden[f"{run}.x1"]) <= 1e-12
        assert relative_error(states[(setting.steps + 1) // 2 - 1], golden[f"{run}.xmid"]) <= 1e-12


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name("")[1:])
def test_a_network_that_predicts_the_image_equals_golden(setting: Setting) -> None:
    """EulerSamplerJiT: the conversion comes before guidance."""
    golden, run = tensors("samplers"), setting.name("euler_jit")

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return image_to_velocity(toy_network(x, t, y), x, t)

    images = sample(
        velocity,
        golden["noise"].double(),
        golden["cond"].double(),
        golden["uncond"].double(),
        steps=setting.steps,
        guidance_scale=setting.guidance_scale,
        guidance_interval=setting.interval,
        time_shift=setting.time_shift,
    )
    assert relative_error(images, golden[f"f64.{run}.x"]) <= 1e-6


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name("")[1:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_sample_equals_golden(kind: str, setting: Setting, dtype: torch.dtype) -> None:
    golden, (solver, order) = tensors("samplers"), KINDS[kind]
    run, network = setting.name(kind), Recorder()
    images = sample(
        network,
        golden["noise"].to(dtype),
        golden["cond"].to(dtype),
        golden["uncond"].to(dtype),
        steps=setting.steps,
        solver=solver,
        order=order,
        guidance_scale=setting.guidance_scale,
        guidance_interval=setting.interval,
        time_shift=setting.time_shift,
    )
    assert images.dtype == dtype
    if solver == "adams":
        expected = golden[f"f64coeff.{run}.x"]
    else:
        expected = golden[f"{'f64' if dtype == torch.float64 else 'f32'}.{run}.x"]
    # Ours are the exact times and the golden ones float32, 6e-8 apart; order 4 amplifies that.
    assert relative_error(images, expected) <= (5e-6 if order == 4 else 1e-6)

    facts = document("samplers_meta")["runs"][run]
    assert len(network.times) == facts["nfe"]
    assert_golden_times(network.times, facts["t_evaluated"])


@pytest.mark.parametrize(
    ("kind", "closed_end"),
    [("euler", True), ("heun_exact", True), ("heun_pec", True), ("adamlm2", False)],
)
def test_guidance_per_call_equals_golden(kind: str, closed_end: bool) -> None:
    solver, order = KINDS[kind]
    table = document("samplers_meta")["guidance_scale_used_per_call_t0_.25_.5_.75"]
    for interval, scales in table["adamlm" if solver == "adams" else kind].items():
        low, high = map(float, interval.strip("[]").split(","))
        network = Recorder()
        sample(
            network,
            torch.zeros(3, 1, 2, 2),
            torch.ones(3),
            torch.zeros(3),
            steps=4,
            solver=solver,
            order=order,
            guidance_scale=3.0,
            guidance_interval=(low, high),
        )
        # Where guidance is off, the unconditional half is not computed.
        assert network.batch_sizes == [3 if scale == 1 else 6 for scale in scales], interval


# --- the time grid --------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name("")[1:])
def test_time_grid_equals_golden(setting: Setting) -> None:
    golden = tensors("samplers")[f"{setting.name('euler')}.timesteps"]
    times = time_grid(setting.steps, setting.time_shift)
    assert len(times) == setting.steps + 1
    assert_golden_times(times, golden.tolist())


@pytest.mark.parametrize("run", ["euler.last0.04", "adamlm2.last0.04"])
def test_a_last_step_of_its_own_equals_golden(run: str) -> None:
    golden = tensors("samplers")
    facts = document("samplers_meta")["runs"][run]
    # The times of this run are shifted: 0.0563 is 0.1067 shifted by 2.
    times = time_grid(10, time_shift=2.0, last_step=0.04)
    assert_golden_times(times, golden[f"{run}.timesteps"].tolist())
    assert_golden_times(times[:-1], facts["t_evaluated"])


def test_one_step_equals_golden() -> None:
    golden = tensors("samplers")
    assert time_grid(1) == golden["euler.n1.timesteps"].tolist() == [0, 1]
    network = Recorder()
    images = sample(
        network, golden["noise"], golden["cond"], golden["uncond"], steps=1, guidance_scale=3.2
    )
    assert relative_error(images, golden["f64.euler.n1.x"]) <= 1e-12
    assert network.times == [0] and network.batch_sizes == [2]


@given(st.integers(1, 300), st.floats(0.1, 10))
def test_time_grid_rises_from_zero_to_one(steps: int, time_shift: float) -> None:
    times = time_grid(steps, time_shift)
    assert len(times) == steps + 1
    assert times[0] == 0 and times[-1] == 1
    assert all(a < b for a, b in pairwise(times))


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps must be at least 1, not {steps}"):
        time_grid(steps)


@pytest.mark.parametrize("last_step", [0.0, -0.1, 1.5, math.nan])
def test_an_impossible_last_step_is_refused(last_step: float) -> None:
    with pytest.raises(ValueError, match="last step"):
        time_grid(10, last_step=last_step)


@pytest.mark.parametrize(("steps", "time_shift"), [(2, 1e-30), (100, 1e-9), (2, 1e40), (10**21, 1)])
def test_times_that_are_equal_are_refused(steps: int, time_shift: float) -> None:
    with pytest.raises(UserError, match="too close to each other for numbers of 32 bits"):
        time_grid(steps, time_shift)


# --- Adams coefficients ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "textbook"),
    [
        (1, [1.0]),
        (2, [-1 / 2, 3 / 2]),
        (3, [5 / 12, -16 / 12, 23 / 12]),
        (4, [-9 / 24, 37 / 24, -59 / 24, 55 / 24]),
    ],
)
def test_even_steps_give_adams_bashforth(order: int, textbook: list[float]) -> None:
    nodes = [0.1 * k for k in range(order)]
    weights = adams_coefficients(nodes, nodes[-1], nodes[-1] + 0.1)
    assert weights == pytest.approx(textbook, abs=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.floats(0.01, 1), st.floats(-1, 1))
def test_polynomials_are_integrated_exactly(gaps: list[float], step: float, first: float) -> None:
    nodes = [first + sum(gaps[:k]) for k in range(len(gaps))]
    start, end = nodes[-1], nodes[-1] + step
    weights = adams_coefficients(nodes, start, end)
    size = sum(map(abs, weights))
    assert sum(weights) == pytest.approx(1, abs=1e-12 * size)
    for degree in range(len(nodes)):
        # Centred on the step's start, where the powers stay small.
        numeric = (end - start) * sum(
            w * (node - start) ** degree for w, node in zip(weights, nodes, strict=True)
        )
        exact = step ** (degree + 1) / (degree + 1)
        scale = size * max(step, sum(gaps)) ** (degree + 1)
        assert numeric == pytest.approx(exact, abs=1e-11 * scale)


# --- accuracy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "adams_order", "expected"),
    [
        ("euler", 2, 1),
        ("heun", 2, 2),
        ("heun-pec", 2, 2),
        ("adams", 1, 1),
        ("adams", 2, 2),
    ],
)
@pytest.mark.parametrize("time_shift", [1.0, 3.0])
def test_order_of_convergence(
    solver: str, adams_order: int, expected: int, time_shift: float
) -> None:
    """dx/dt = x·cos(t) has the solution x₀·exp(sin t)."""

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        return x * math.cos(t)

    start = torch.ones(1, dtype=torch.float64)
    errors = []
    for steps in (100, 200):
        *_, end = solve(velocity, start, time_grid(steps, time_shift), solver, adams_order)
        errors.append(abs(end.item() - math.exp(math.sin(1))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_integrates_polynomials_exactly_once_it_has_started(order: int) -> None:
    """The first steps are of a lower order, for want of earlier slopes."""
    times = time_grid(12, time_shift=2.0)
    zero = torch.zeros(1, dtype=torch.float64)
    for degree in range(order + 1):

        def velocity(x: Tensor, t: float, step_start: float, degree: int = degree) -> Tensor:
            return torch.full_like(x, t**degree)

        states = solve(velocity, zero, times, "adams", order)
        positions = [0.0, *(state.item() for state in states)]
        antiderivative = [t ** (degree + 1) / (degree + 1) for t in times]
        errors = [
            abs((positions[i + 1] - positions[i]) - (antiderivative[i + 1] - antiderivative[i]))
            for i in range(order - 1, 12)
        ]
        assert (max(errors) < 1e-14) == (degree < order), degree


@pytest.mark.parametrize("kind", KINDS)
def test_a_straight_path_is_exact(kind: str) -> None:
    """With the velocity of the linear path every solver lands on the data."""
    solver, order = KINDS[kind]
    data, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    images = sample(
        lambda x, t, y: data - noise, noise, torch.zeros(3), steps=7, solver=solver, order=order
    )
    assert relative_error(images, data) <= 1e-12


# --- the loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("solver", "evaluations"), [("euler", 8), ("heun", 15), ("heun-pec", 8), ("adams", 8)]
)
def test_unguided_sampling_never_computes_the_unconditional_half(
    scale: float, solver: str, evaluations: int
) -> None:
    network = Recorder()
    # Either the scale is 1, or no time is inside the interval.
    interval = (0.0, 1.0) if scale == 1 else (0.0, 0.0)
    sample(
        network,
        torch.zeros(3, 1, 2, 2),
        torch.ones(3),
        steps=8,
        solver=solver,
        guidance_scale=scale,
        guidance_interval=interval,
    )
    assert network.batch_sizes == [3] * evaluations


def test_the_first_step_is_never_guided_and_the_others_are() -> None:
    network = Recorder()
    condition, uncondition = torch.tensor([1.0, 2.0]), torch.tensor([8.0, 9.0])
    noise = torch.zeros(2, 1, 2, 2)
    sample(network, noise, condition, uncondition, steps=4, guidance_scale=2.0)
    assert network.batch_sizes == [2, 4, 4, 4]
    assert network.conditions[0].tolist() == [1, 2]
    # The unconditional half comes first, as published (B.10).
    assert network.conditions[1].tolist() == [8, 9, 1, 2]


def test_labels_may_be_a_list() -> None:
    network = Recorder()
    sample(network, torch.zeros(2, 1, 2, 2), [1, 2], steps=1)
    assert network.conditions[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="2 noises but conditions of shape"):
        sample(network, torch.zeros(2, 1, 2, 2), [1, 2, 3], steps=1)


def test_the_uncondition_may_be_a_number_or_a_list() -> None:
    for uncondition in (7, [7, 7], torch.tensor([7, 7])):
        network = Recorder()
        noise = torch.zeros(2, 1, 2, 2)
        sample(network, noise, [1, 2], uncondition, steps=2, guidance_scale=2.0)
        assert network.conditions[1].tolist() == [7, 7, 1, 2]


def test_guidance_with_rescale_reaches_the_velocity() -> None:
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    arguments: Any = {"steps": 2, "guidance_scale": 3.0}
    condition, uncondition = torch.ones(2).double(), torch.zeros(2).double()
    x = noise + 0.5 * toy_network(noise, torch.zeros(2), condition)
    u, c = (toy_network(x, torch.full((2,), 0.5), y) for y in (uncondition, condition))
    for rescale in (0.0, 0.7):
        images = sample(
            toy_network, noise, condition, uncondition, guidance_rescale=rescale, **arguments
        )
        assert relative_error(images, x + 0.5 * guide(u, c, 3.0, rescale)) <= 1e-12


def test_state_and_guidance_are_float32_for_a_bf16_network() -> None:
    def bf16_network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return toy_network(x, t, y).bfloat16()

    def rounded_network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return bf16_network(x, t, y).float()

    noise, condition, uncondition = torch.randn(2, 3, 4, 4), torch.ones(2), torch.zeros(2)
    for solver in ("euler", "heun", "heun-pec", "adams"):
        images, expected = (
            sample(
                network, noise, condition, uncondition, steps=6, solver=solver, guidance_scale=3.0
            )
            for network in (bf16_network, rounded_network)
        )
        assert images.dtype == torch.float32
        assert torch.equal(images, expected)


def test_bf16_noise_gives_float32_images() -> None:
    images = sample(toy_network, torch.zeros(1, 3, 2, 2).bfloat16(), torch.ones(1), steps=2)
    assert images.dtype == torch.float32


def test_the_uncondition_of_a_model_is_its_null_class() -> None:
    model = DeCo(
        DeCoConfig(hidden_size=16, depth=1, num_heads=2, patch_size=4, num_classes=5)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    arguments: Any = {"steps": 3, "guidance_scale": 3.0}
    images = sample(model, noise, labels, **arguments)
    null = torch.tensor([5, 5])
    assert torch.equal(images, sample(model, noise, labels, null, **arguments))
    assert not torch.equal(images, sample(model, noise, labels, labels.flip(0), **arguments))
    assert not images.requires_grad


def test_an_uncondition_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(ValueError, match="uncondition"):
        sample(toy_network, torch.zeros(1, 3, 2, 2), torch.ones(1), guidance_scale=2.0)


def test_the_arguments_are_left_alone() -> None:
    noise, condition, uncondition = torch.randn(2, 3, 4, 4), torch.ones(2), torch.zeros(2)
    copies = [tensor.clone() for tensor in (noise, condition, uncondition)]
    for solver in ("euler", "heun", "heun-pec", "adams"):
        sample(toy_network, noise, condition, uncondition, steps=3, solver=solver, guidance_scale=2)
    for tensor, copy in zip((noise, condition, uncondition), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_progress_is_shown_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Any = (toy_network, torch.zeros(1, 3, 2, 2), torch.ones(1))
    sample(*arguments, steps=3)
    assert capsys.readouterr() == ("", "")
    sample(*arguments, steps=3, progress=True)
    shown = capsys.readouterr()
    assert "3/3" in shown.err and "step" in shown.err
    assert shown.out == ""


# --- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"solver": "huen"}, r"unknown solver 'huen'.*'heun'"),
        ({"solver": "heun_pec"}, r"unknown solver 'heun_pec'.*'heun-pec'"),
        ({"solver": "zzz"}, r"unknown solver 'zzz'.*adams, euler, heun, heun-pec"),
        ({"solver": "adams", "order": 5}, "order must be 1 … 4, not 5"),
        ({"solver": "adams", "order": 0}, "order must be 1 … 4, not 0"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance interval"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance interval"),
        ({"time_shift": 0.0}, "time_shift must be above 0, not 0.0"),
        ({"time_shift": -1.0}, "time_shift must be above 0, not -1.0"),
        ({"guidance_rescale": 5.0}, "guidance_rescale must be 0 … 1, not 5.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite, not nan"),
        ({"steps": 2.5}, "steps must be of type int, not 2.5"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_before_the_network_is_called(
    arguments: dict[str, Any], message: str
) -> None:
    network = Recorder()
    with pytest.raises(ValueError, match=message):
        sample(network, torch.zeros(2, 3, 2, 2), torch.ones(2), torch.zeros(2), **arguments)
    assert not network.times


def test_conditions_must_be_as_many_as_noises() -> None:
    with pytest.raises(ValueError, match=r"2 noises.*\(3,\)"):
        sample(toy_network, torch.zeros(2, 3, 2, 2), torch.ones(3))


def test_solvers_check_their_name_and_order() -> None:
    check_solver("adams", 4)
    with pytest.raises(ValueError, match=r"'eulr'.*'euler'"):
        check_solver("eulr")
    with pytest.raises(ValueError, match=r"'eulr'.*'euler'"):
        solve(lambda x, t, start: x, torch.zeros(1), [0.0, 1.0], "eulr")
    with pytest.raises(ValueError, match="order"):
        check_solver("adams", 5)
