"""The fused loss in Triton against the reference in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor

from deco_fast import ops
from deco_fast.kernels.flow_matching_loss import reference
from deco_fast.losses import frequency_table

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from deco_fast.kernels.flow_matching_loss import gpu

DEVICE = interpreter.DEVICE
WEIGHT = 0.7

# A program takes 16 blocks: a fraction of one program, several, and blocks of several images in
# one. Then sides that need padding, under a block, of one pixel, and with reflections that reach
# the block before.
SIZES = [
    *((8, 8), (16, 256), (24, 136), (40, 72)),
    *((9, 13), (33, 8), (8, 15), (17, 130), (1, 3), (2, 5), (1, 1), (7, 7)),
]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what is expected."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    return float((value - expected).norm() / expected.norm())


def velocities(
    height: int, width: int, dtype: torch.dtype = torch.float32, target: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    shape = 3, 3, height, width
    pair = torch.randn(shape).to(dtype), torch.randn(shape).to(target or dtype)
    return pair[0].to(DEVICE).requires_grad_(), pair[1].to(DEVICE).requires_grad_()


def expect(prediction: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Total, its terms and the gradient for the prediction, in float64."""
    inputs = prediction.detach().double().requires_grad_(), target.detach().double()
    table = frequency_table().to(DEVICE)
    losses = reference.flow_matching_loss(*inputs, table, WEIGHT, weights)
    losses[0].backward()
    assert inputs[0].grad is not None
    return *losses, inputs[0].grad


def check(
    prediction: Tensor, target: Tensor, weights: Tensor | None, gradient_error: float
) -> None:
    table = frequency_table().to(DEVICE)
    expected = expect(prediction, target, weights)
    with ops.use_backend("triton"):
        total, *terms = ops.flow_matching_loss(prediction, target, table, WEIGHT, weights)
    (3 * total).backward()
    for value, reference_value in zip((total, *terms), expected, strict=False):
        assert value.dtype == torch.float32
        assert relative_error(value, reference_value) < 1e-6
    for tensor, sign in ((prediction, 3), (target, -3)):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert relative_error(tensor.grad, sign * expected[-1]) < gradient_error


class TestLoss:
    __test__ = interpreter.KERNELS_RUN
    pytestmark = interpreter.MARKS

    @pytest.fixture(autouse=True)
    def _poison(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory that a kernel does not write must not look like a result."""
        new_empty = Tensor.new_empty

        def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return new_empty(self, *args, **kwargs).fill_(float("nan"))

        monkeypatch.setattr(Tensor, "new_empty", poisoned)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_values_and_gradients(self, height: int, width: int, weighted: bool) -> None:
        weights = torch.rand(3, device=DEVICE) + 0.5 if weighted else None
        check(*velocities(height, width), weights, gradient_error=1e-6)

    @pytest.mark.parametrize("target", [torch.float16, torch.float32])
    @pytest.mark.parametrize("size", [(16, 32), (9, 13)])
    def test_float16(self, size: tuple[int, int], target: torch.dtype) -> None:
        check(*velocities(*size, torch.float16, target), None, gradient_error=1e-3)

    @pytest.mark.gpu
    @pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("size", [(16, 32), (9, 13)])
    def test_bfloat16(self, size: tuple[int, int], target: torch.dtype) -> None:
        check(*velocities(*size, torch.bfloat16, target), None, gradient_error=1e-2)

    def test_strided_inputs(self) -> None:
        prediction, target = velocities(16, 24)
        weights = torch.rand(6, device=DEVICE)[::2]
        expected = expect(prediction, target, weights)
        table = frequency_table().to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
        strided = prediction.detach().to(memory_format=torch.channels_last)
        assert not strided.is_contiguous()
        results = gpu.forward(strided, target.detach(), table, WEIGHT, weights, True)
        for value, reference_value in zip(results, expected, strict=True):
            assert relative_error(value, reference_value) < 1e-6

    @pytest.mark.parametrize("size", [(16, 24), (9, 13)])
    def test_without_gradient(self, size: tuple[int, int]) -> None:
        prediction, target = velocities(*size)
        expected = expect(prediction, target, None)
        table = frequency_table().to(DEVICE)
        *losses, gradient = gpu.forward(
            prediction.detach(), target.detach(), table, WEIGHT, None, False
        )
        assert gradient.numel() == 0
        for value, reference_value in zip(losses, expected, strict=False):
            assert relative_error(value, reference_value) < 1e-6

    def test_each_frequency_has_its_own_weight(self) -> None:
        # With frequency_table, two components share a table and its transpose is much like it.
        prediction, target = velocities(8, 16)
        table = torch.rand(3, 8, 8, device=DEVICE)
        expected = reference.flow_matching_loss(prediction.double(), target.double(), table, WEIGHT)
        with ops.use_backend("triton"):
            losses = ops.flow_matching_loss(prediction, target, table, WEIGHT)
        assert relative_error(losses[2], expected[2]) < 1e-6
        gradient = torch.autograd.grad(losses[0], prediction)[0]
        assert relative_error(gradient, torch.autograd.grad(expected[0], prediction)[0]) < 1e-6

    @pytest.mark.parametrize("factor", [1, 0.25])
    def test_gradient_of_a_part_of_the_loss(self, factor: float) -> None:
        """What was kept is scaled in place; twice, where the graph is kept, from the same."""
        prediction, target = velocities(9, 24)
        expected = factor * expect(prediction, target, None)[-1]
        with ops.use_backend("triton"):
            table = frequency_table().to(DEVICE)
            part = factor * ops.flow_matching_loss(prediction, target.detach(), table, WEIGHT)[0]
        for keep in (True, True, False):
            (gradient,) = torch.autograd.grad(part, prediction, retain_graph=keep)
            assert relative_error(gradient, expected) < 1e-6

    def test_shapes_that_do_not_fit_are_errors(self) -> None:
        """The kernels go by pointers: they would read what is not ours."""
        prediction, target = velocities(16, 24)
        table, weights = frequency_table().to(DEVICE), torch.ones(3, device=DEVICE)
        for wrong, message in (
            ((prediction, target[..., 8:], table, 1.0, None), r"target must be \(3, 3, 16, 24\)"),
            ((prediction[:, :1], target[:, :1], table, 1.0, None), r"prediction must be \(3, 3,"),
            ((prediction, target, table[:1], 1.0, None), r"table must be \(3, 8, 8\)"),
            ((prediction, target, table, 1.0, weights[:1]), r"timestep_weight must be \(3,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                gpu.forward(*wrong, with_gradient=True)

    def test_no_difference_is_no_loss(self) -> None:
        prediction = velocities(16, 16)[0].detach()
        table = frequency_table().to(DEVICE)
        for result in gpu.forward(prediction, prediction, table, WEIGHT, None, True):
            assert torch.all(result == 0)

    @pytest.mark.gpu
    @pytest.mark.slow
    def test_more_than_2_31_values(self) -> None:
        needed = 16 * 2**30
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip("needs 16 GiB of free GPU memory")
        batch = 2**31 // (3 * 512 * 512) + 2
        prediction = torch.zeros(batch, 3, 512, 512, dtype=torch.bfloat16, device=DEVICE)
        target = torch.zeros_like(prediction)
        prediction[-1].normal_()
        table = frequency_table().to(DEVICE)
        total, *_, gradient = gpu.forward(prediction, target, table, WEIGHT, None, True)
        alone = gpu.forward(prediction[-1:], target[-1:], table, WEIGHT, None, True)
        assert relative_error(batch * total, alone[0]) < 1e-5
        assert relative_error(batch * gradient[-1:].float(), alone[-1]) < 1e-2
        assert not gradient[:-1].any()


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
        types = {}
        for name, value in zip(self.arg_names, args, strict=False):
            if value is None:
                constants[name] = None
            elif isinstance(value, Tensor):
                names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
                types[name] = f"*{names[value.dtype]}"
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
        self.launches.append((types, constants, num_warps, num_stages))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    names = "loss_kernel", "mean_kernel", "scale_kernel"
    recorders = [Recorder(getattr(gpu, name)) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(gpu, name, recorder)
    yield recorders


def test_what_is_launched_is_what_is_compiled_ahead_of_time(
    recorders: list[Recorder],
) -> None:
    stated = [
        (s.types, s.constants, s.num_warps, s.num_stages)
        for s in gpu.specialisations(capability=90)
    ]
    dtypes = [
        *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        (torch.bfloat16, torch.float32),
    ]
    for (prediction, target), side, full in itertools.product(dtypes, (16, 9), (True, False)):
        *_, gradient = gpu.forward(
            *(torch.zeros(2, 3, side, side, dtype=dtype) for dtype in (prediction, target)),
            *(frequency_table(), WEIGHT, torch.ones(2) if full else None, full),
        )
        gpu.scale_(gradient, torch.ones(()))
    launched = [launch for recorder in recorders for launch in recorder.launches]
    assert all(launch in stated for launch in launched)
    assert all(launch in launched for launch in stated)


@pytest.mark.slow
@pytest.mark.skipif(interpreter.INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    interpreter.run_cases(__file__)
