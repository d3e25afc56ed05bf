"""The fused loss in C++ against the reference in float64: values, gradients, shapes, dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deco_fast import ops
from deco_fast.kernels import registry
from deco_fast.kernels.flow_matching_loss import reference
from deco_fast.losses import frequency_table

pytestmark = pytest.mark.skipif(
    "cpp" not in registry._implementations["flow_matching_loss"],
    reason=f"the C++ backend is not available: {registry.extension_problem()}",
)

WEIGHT = 0.7

# Whole tiles and not, sides under a block, and paddings that reach into the block before.
SIZES = [
    *((8, 8), (16, 256), (24, 136), (1, 1), (2, 3)),
    *((7, 9), (9, 15), (17, 130), (12, 264), (8, 1)),
]


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    with ops.use_backend("cpp"):
        yield


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what is expected."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm().clamp(min=1e-30))


def make(
    height: int, width: int, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    prediction = torch.randn(batch, 3, height, width).to(dtype).requires_grad_()
    return prediction, torch.randn(batch, 3, height, width).to(dtype).requires_grad_()


def expected_of(
    prediction: Tensor, target: Tensor, timestep_weight: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The three losses and the two gradients in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (prediction, target)]
    weight = None if timestep_weight is None else timestep_weight.double()
    table = frequency_table().double()
    losses = reference.flow_matching_loss(*inputs, table, WEIGHT, weight)
    return list(losses), list(torch.autograd.grad(losses[0], inputs))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(
    height: int, width: int, weighted: bool, instruction_set: str
) -> None:
    prediction, target = make(height, width)
    timestep_weight = torch.tensor([0.3, 2.5]) if weighted else None
    losses = ops.flow_matching_loss(prediction, target, frequency_table(), WEIGHT, timestep_weight)
    gradients = torch.autograd.grad(losses[0], [prediction, target])
    expected, expected_gradients = expected_of(prediction, target, timestep_weight)
    for value, reference_value in zip(losses, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, reference_value) < 1e-6
    for gradient, reference_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, reference_gradient) < 1e-6


@pytest.mark.parametrize(
    ("prediction_dtype", "target_dtype"),
    list(itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)),
)
def test_dtypes(
    prediction_dtype: torch.dtype, target_dtype: torch.dtype, instruction_set: str
) -> None:
    prediction = make(19, 37, dtype=prediction_dtype)[0]
    target = make(19, 37, dtype=target_dtype)[1]
    losses = ops.flow_matching_loss(prediction, target, frequency_table(), WEIGHT)
    # A loss scale as GradScaler applies it: without one float16 cannot hold the gradient.
    scale = 2.0**12
    gradients = torch.autograd.grad(scale * losses[0], [prediction, target])
    # In training the target has none.
    alone = ops.flow_matching_loss(prediction, target.detach(), frequency_table(), WEIGHT)[0]
    (gradient_alone,) = torch.autograd.grad(scale * alone, prediction)
    expected, expected_gradients = expected_of(prediction, target)
    for value, reference_value in zip(losses, expected, strict=True):
        assert relative_error(value, reference_value) < 1e-6
    for gradient, reference_gradient, leaf in zip(
        gradients, expected_gradients, (prediction, target), strict=True
    ):
        assert gradient.dtype == leaf.dtype
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
        assert relative_error(gradient, scale * reference_gradient) < tolerance[leaf.dtype]
    assert relative_error(alone, expected[0]) < 1e-6
    assert gradient_alone.dtype == prediction_dtype
    error = relative_error(gradient_alone, scale * expected_gradients[0])
    assert error < tolerance[prediction_dtype]


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs come poisoned with NaN; the last tiles of both directions are odd ones."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        prediction, target = make(33, 147)
        total, *_ = ops.flow_matching_loss(prediction, target, frequency_table(), WEIGHT)
        (gradient,) = torch.autograd.grad(total, prediction)
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(gradient.isfinite().all())


def test_strided_inputs_and_gradients() -> None:
    prediction, target = make(40, 24, batch=4)
    strided = prediction.permute(0, 1, 3, 2)[1:3, :, ::2], target.permute(0, 1, 3, 2)[1:3, :, ::2]
    assert not strided[0].is_contiguous()
    total, *_ = ops.flow_matching_loss(*strided, frequency_table(), WEIGHT)
    gradients = torch.autograd.grad(total.expand(5).sum(), [prediction, target])
    with ops.use_backend("reference"):
        expected, *_ = ops.flow_matching_loss(*strided, frequency_table(), WEIGHT)
        expected_gradients = torch.autograd.grad(5 * expected, [prediction, target])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected_gradient) < 1e-6


def test_the_number_of_threads_changes_no_bit(instruction_set: str) -> None:
    prediction, target = make(64, 300, batch=3)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            losses = ops.flow_matching_loss(prediction, target, frequency_table(), WEIGHT)
            (gradient,) = torch.autograd.grad(losses[0], prediction)
            results.append((torch.stack(losses).detach(), gradient))
    finally:
        torch.set_num_threads(threads)
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_only_the_total_has_a_gradient() -> None:
    prediction, target = make(16, 16)
    total, flow_matching, frequency = ops.flow_matching_loss(
        prediction, target.detach(), frequency_table(), WEIGHT
    )
    assert total.requires_grad
    assert not flow_matching.requires_grad
    assert not frequency.requires_grad


def test_a_learned_table_goes_to_the_reference() -> None:
    prediction, target = make(16, 16)
    table = frequency_table().requires_grad_()
    total, _, frequency = ops.flow_matching_loss(prediction, target, table, WEIGHT)
    (gradient,) = torch.autograd.grad(total, table)
    assert float((gradient * table).sum().detach()) == pytest.approx(WEIGHT * float(frequency))


def test_float64_goes_to_the_reference() -> None:
    prediction, target = make(16, 24, dtype=torch.float64)
    total, *_ = ops.flow_matching_loss(prediction, target, frequency_table().double(), WEIGHT)
    assert total.dtype == torch.float64


def test_nan_is_not_hidden() -> None:
    prediction, target = make(16, 16)
    with torch.no_grad():
        prediction[1, 2, 9, 3] = float("nan")
    losses = ops.flow_matching_loss(prediction, target, frequency_table(), WEIGHT)
    assert all(bool(loss.isnan()) for loss in losses)


def test_an_empty_batch_gives_nan_as_the_reference_does() -> None:
    prediction, target = make(16, 16, batch=0)
    total, *_ = ops.flow_matching_loss(prediction, target, frequency_table(), WEIGHT)
    assert bool(total.isnan())
    (gradient,) = torch.autograd.grad(total, prediction)
    assert gradient.shape == prediction.shape
