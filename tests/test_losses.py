"""The training loss: goldens, and oracles that nobody here wrote (specification B.7)."""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from golden import relative_error, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dct, dctn
from torch import Tensor

from deco_fast import flow_matching_loss, frequency_table, ops
from deco_fast.kernels.flow_matching_loss.reference import (
    RGB_TO_YCBCR,
    dct_matrix,
    ycbcr_block_dct,
)

SHAPES = ["2x3x32x32", "1x3x40x24", "1x3x30x20"]
TABLES = {
    "q85.inv_gamma.g1.0": (85, "inv_gamma", 1.0),
    "q50.inv.g1.0": (50, "inv", 1.0),
    "q95.inv_gamma.g0.5": (95, "inv_gamma", 0.5),
}

Array = npt.NDArray[np.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    prediction, target = torch.randn(2, *shape, generator=generator())
    return prediction, target


# --- goldens --------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 85, 95, 100])
@pytest.mark.parametrize(("mode", "gamma"), [("inv", 1.0), ("inv_gamma", 1.0), ("inv_gamma", 0.5)])
def test_tables_equal_golden(quality: int, mode: Any, gamma: float) -> None:
    golden = tensors("loss_freq")[f"freq_w.q{quality}.{mode}.g{gamma}"]
    table = frequency_table(quality, mode, gamma)
    assert table.dtype == torch.float32
    assert relative_error(table, golden.view(3, 8, 8)) <= 1e-6


def test_transform_matrices_equal_golden() -> None:
    golden = tensors("loss_freq")
    # The golden matrix was made in float32, with an error of 1e-6; scipy's is exact.
    assert relative_error(dct_matrix(), golden["dct_mat"]) <= 2e-6
    exact = torch.from_numpy(dct(np.eye(8), axis=0, norm="ortho"))
    assert relative_error(dct_matrix(), exact) <= 1e-7
    assert relative_error(dct_matrix(dtype=torch.float64), exact) <= 1e-14
    assert relative_error(torch.tensor(RGB_TO_YCBCR), golden["rgb2ycbcr_matrix_rows"]) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients_equal_golden(shape: str) -> None:
    golden = tensors("loss_freq")
    coefficients = ycbcr_block_dct(golden[f"{shape}.out"])
    assert relative_error(coefficients, golden[f"{shape}.dct_ycbcr_out"]) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TABLES)
def test_values_and_gradients_equal_golden(shape: str, name: str) -> None:
    golden = tensors("loss_freq")
    table = frequency_table(*TABLES[name])  # type: ignore[arg-type]
    prediction = golden[f"{shape}.out"].clone().requires_grad_()
    target = golden[f"{shape}.v_t"]

    total, flow_matching, frequency = flow_matching_loss(prediction, target, table, 2.5)
    assert total.dtype == flow_matching.dtype == frequency.dtype == torch.float32
    assert relative_error(flow_matching, golden[f"{shape}.fm_loss"]) <= 1e-6
    assert relative_error(frequency, golden[f"{shape}.{name}.fm_loss_freq"]) <= 1e-6
    assert relative_error(frequency, golden[f"{shape}.{name}.fm_loss_freq_f64"]) <= 1e-6
    assert relative_error(total, flow_matching + 2.5 * frequency) <= 1e-6

    (gradient,) = torch.autograd.grad(total, prediction)
    gradient_fm, gradient_freq = golden[f"{shape}.grad_fm"], golden[f"{shape}.{name}.grad_freq"]
    assert relative_error(gradient, gradient_fm + 2.5 * gradient_freq) <= 2e-6

    without, _, _ = flow_matching_loss(prediction, target, table, 0.0)
    (gradient,) = torch.autograd.grad(without, prediction)
    assert relative_error(gradient, gradient_fm) <= 1e-6


# --- oracles --------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [1, 2, 24, 25, 49, 50, 51, 75, 85, 95, 99, 100])
def test_tables_are_those_of_a_jpeg_that_pillow_saved(quality: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    quantization = Image.open(file).quantization  # type: ignore[attr-defined]
    luminance, chrominance = (np.array(quantization[i], dtype=float) for i in (0, 1))
    inverse = 1 / np.stack([luminance, chrominance, chrominance]).reshape(3, 8, 8)
    expected = torch.from_numpy(inverse / inverse.mean(axis=(1, 2), keepdims=True))
    assert relative_error(frequency_table(quality, "inv"), expected) <= 1e-6


@pytest.mark.parametrize(("outside", "inside"), [(0, 1), (-5, 1), (101, 100)])
def test_a_quality_outside_is_clamped_as_by_libjpeg(outside: int, inside: int) -> None:
    assert torch.equal(frequency_table(outside), frequency_table(inside))


@given(st.integers(1, 100), st.floats(0, 2))
def test_every_table_is_positive_and_of_mean_one(quality: int, gamma: float) -> None:
    table = frequency_table(quality, "inv_gamma", gamma)
    assert table.shape == (3, 8, 8) and (table > 0).all()
    assert torch.allclose(table.mean(dim=(1, 2)), torch.ones(3))
    assert torch.equal(table[1], table[2])


def test_exponents_one_and_zero() -> None:
    assert torch.allclose(frequency_table(30), frequency_table(30, "inv"))
    assert torch.equal(frequency_table(30, gamma=0.0), torch.ones(3, 8, 8))


def ycbcr_dct_by_numpy_and_scipy(image: Array) -> Array:
    """(B, 3, H, W) to its block coefficients (B, 3, H/8, W/8, 8, 8), another way than ours."""
    r, g, b = image[:, 0], image[:, 1], image[:, 2]
    planes = np.stack(
        [
            0.299 * r + 0.587 * g + 0.114 * b,
            -0.168736 * r - 0.331264 * g + 0.5 * b,
            0.5 * r - 0.418688 * g - 0.081312 * b,
        ],
        axis=1,
    )
    down, right = -image.shape[2] % 8, -image.shape[3] % 8
    planes = np.pad(planes, [(0, 0), (0, 0), (0, down), (0, right)], mode="reflect")
    rows, columns = planes.shape[2] // 8, planes.shape[3] // 8
    blocks = planes.reshape(*planes.shape[:2], rows, 8, columns, 8).swapaxes(3, 4)
    return dctn(blocks, axes=(-2, -1), norm="ortho")


@settings(max_examples=60)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40))
def test_coefficients_are_scipys_at_any_size(batch: int, height: int, width: int) -> None:
    image = torch.randn(batch, 3, height, width, dtype=torch.float64, generator=generator())
    expected = torch.from_numpy(ycbcr_dct_by_numpy_and_scipy(image.numpy()))
    coefficients = ycbcr_block_dct(image)
    assert coefficients.shape == (batch, 3, -(-height // 8), -(-width // 8), 8, 8)
    assert (coefficients - expected).abs().max() < 1e-10


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_the_loss_at_any_size(batch: int, height: int, width: int) -> None:
    prediction, target = pair(batch, 3, height, width)
    weight = torch.rand(batch, generator=generator(3))
    table = frequency_table(60, gamma=0.7)
    prediction.requires_grad_()
    total, flow_matching, frequency = flow_matching_loss(prediction, target, table, 0.5, weight)

    difference = (prediction.detach().double() - target.double()).numpy()
    expected_fm = float((weight.numpy()[:, None, None, None] * difference**2).mean())
    coefficients = ycbcr_dct_by_numpy_and_scipy(difference)
    expected_frequency = float((table.numpy()[:, None, None] * coefficients**2).mean())
    assert float(flow_matching) == pytest.approx(expected_fm, rel=2e-6)
    assert float(frequency) == pytest.approx(expected_frequency, rel=2e-6)
    assert total.item() == pytest.approx(expected_fm + 0.5 * expected_frequency, rel=2e-6)
    (gradient,) = torch.autograd.grad(total, prediction)
    # Both terms are quadratic forms of the difference: Euler's theorem.
    product = (gradient.double() * torch.from_numpy(difference)).sum()
    assert product.item() == pytest.approx(2 * total.item(), rel=2e-6)


@pytest.mark.parametrize("size", [(8, 16), (3, 11)])
def test_gradients_by_finite_differences(size: tuple[int, int]) -> None:
    prediction, target = (tensor.double() for tensor in pair(2, 3, *size))
    weight, table = torch.rand(2, generator=generator()), frequency_table().double()
    assert torch.autograd.gradcheck(
        lambda p: flow_matching_loss(p, target, table, 0.7, weight)[0],
        prediction.requires_grad_(),
        fast_mode=True,
    )


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-autocast"])
def test_a_small_difference_loses_nothing(autocast: bool) -> None:
    """The published code transforms both images, in bf16, and is 5.6% off here (D1)."""
    target = torch.randn(2, 3, 32, 32, generator=generator())
    prediction = target + 0.02 * torch.randn(target.shape, generator=generator(1))
    table = frequency_table()
    exact = flow_matching_loss(prediction.double(), target.double(), table.double(), 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = flow_matching_loss(prediction, target, table, 1.0)
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) <= 1e-5


def test_bf16_predictions_are_compared_in_float32() -> None:
    prediction, target = pair(2, 3, 16, 24)
    table, half = frequency_table(), prediction.bfloat16().requires_grad_()
    total, *terms = flow_matching_loss(half, target, table, 1.0)
    expected = flow_matching_loss(half.detach().float(), target, table, 1.0)
    for actual, exact in zip((total, *terms), expected, strict=True):
        torch.testing.assert_close(actual.detach(), exact, rtol=1e-6, atol=0)
    total.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_the_two_terms_carry_no_gradient() -> None:
    prediction, target = pair(1, 3, 8, 8)
    total, flow_matching, frequency = flow_matching_loss(
        prediction.requires_grad_(), target, frequency_table(), 1.0
    )
    assert total.requires_grad
    assert not flow_matching.requires_grad and not frequency.requires_grad


# --- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "target"),
    [((2, 3, 8, 8), (2, 3, 8, 16)), ((2, 1, 8, 8), (2, 1, 8, 8)), ((3, 8, 8), (3, 8, 8))],
)
def test_images_of_a_wrong_shape_are_refused(
    prediction: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"must both be \(B, 3, H, W\)"):
        flow_matching_loss(torch.zeros(prediction), torch.zeros(target), frequency_table(), 1.0)


def test_a_table_of_a_wrong_shape_is_refused() -> None:
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"table must be \(3, 8, 8\), not \(8, 8\)"):
        flow_matching_loss(images, images, torch.ones(8, 8), 1.0)


@pytest.mark.parametrize("backend", ["reference", None])
def test_timestep_weights_of_a_wrong_shape_are_refused(backend: str | None) -> None:
    images = torch.zeros(4, 3, 8, 8)
    with ops.use_backend(backend) if backend else nullcontext():
        for shape in ((1,), (4, 1), ()):
            with pytest.raises(ValueError, match="one number for each of 4 images, not"):
                flow_matching_loss(images, images, frequency_table(), 1.0, torch.ones(shape))


def test_an_unknown_mode_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'inv-gamma'.*'inv_gamma'"):
        frequency_table(85, "inv-gamma")  # type: ignore[arg-type]


def test_the_weight_of_the_frequency_loss_can_be_learned() -> None:
    prediction, target = torch.randn(2, 2, 3, 16, 16)
    weight = torch.tensor(0.5, requires_grad=True)
    total, _, frequency = flow_matching_loss(prediction, target, frequency_table(), weight)
    (grad,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(grad, frequency)


@pytest.mark.parametrize("gamma", [1000.0, -101.0, float("nan")])
def test_an_exponent_out_of_bounds_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma must be -100 … 100, not {gamma}"):
        frequency_table(gamma=gamma)


@pytest.mark.parametrize("gamma", [-100.0, 100.0])
def test_the_largest_exponents_give_finite_weights(gamma: float) -> None:
    for quality in (1, 50, 100):
        assert frequency_table(quality, gamma=gamma).isfinite().all()
