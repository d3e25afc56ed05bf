"""Linear layers with packed weights against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deco_fast.kernels.packed_linear.cpu import can_pack, interleave, pack, packed_linear
from deco_fast.kernels.registration import fused_ops

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.skipif(
    not all(map(can_pack, DTYPES)), reason="no extension, or oneDNN has no block products here"
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def layer(rows: int, depth: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + depth + width)
    weight = (torch.randn(width, depth) / depth**0.5).to(dtype)
    return torch.randn(rows, depth).to(dtype), weight, torch.randn(width)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 300), depth=st.integers(1, 80), width=st.integers(1, 200))
def test_linear(dtype: torch.dtype, rows: int, depth: int, width: int) -> None:
    x, weight, bias = layer(rows, 2 * depth, width, dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(packed_linear(x, pack(weight), bias, width), expected) < TOLERANCE[dtype]
    expected = F.linear(x.double(), weight.double())
    assert relative_error(packed_linear(x, pack(weight), None, width), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [512, 514, 1026, 2816])
def test_deep_products(dtype: torch.dtype, depth: int) -> None:
    x, weight, bias = layer(130, depth, 70, dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(packed_linear(x, pack(weight), bias, 70), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("depth", "width"), [(64, 64), (1152, 3456), (3072, 100)])
def test_three_products_are_nearer_to_float32_than_to_bfloat16(depth: int, width: int) -> None:
    x, weight, bias = layer(130, depth, width, torch.float32)
    expected = F.linear(x.double(), weight.double(), bias.double())
    split = packed_linear(x, pack(weight, three_products=True), bias, width)
    assert relative_error(split, expected) < 1e-5


def test_three_products_keep_what_float32_can_hold() -> None:
    x = torch.tensor([[1e30, 1.0], [1e-30, 0.0], [float("inf"), 1.0]])
    weight = torch.eye(2)
    result = packed_linear(x, pack(weight, three_products=True), None, 2)
    torch.testing.assert_close(result[:2], x[:2], rtol=1e-5, atol=0)
    assert not result[2, 0].isfinite()


def test_one_row_without_a_batch() -> None:
    x, weight, bias = layer(4, 64, 70, torch.float32)
    packed = pack(weight)
    rows = packed_linear(x, packed, bias, 70)
    torch.testing.assert_close(packed_linear(x[0], packed, bias, 70), rows[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "width"), [(64, 32), (96, 85), (1152, 3072)])
def test_swiglu(dtype: torch.dtype, depth: int, width: int) -> None:
    x, gate, _ = layer(77, depth, width, dtype)
    _, value, _ = layer(78, depth, width, dtype)
    wide = x.double()
    expected = F.silu(F.linear(wide, gate.double())) * F.linear(wide, value.double())
    weight = interleave(gate, value)
    result = packed_linear(x, pack(weight), None, len(weight), swiglu=True)
    assert relative_error(result[:, :width], expected) < TOLERANCE[dtype]
    assert not result[:, width:].any()


def test_leading_axes_and_strides() -> None:
    x, weight, bias = layer(24, 64, 70, torch.float32)
    expected = F.linear(x, weight, bias).view(2, 3, 4, 70)
    strided = x.view(2, 3, 4, 64).transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(packed_linear(strided, pack(weight), bias, 70), expected)


def test_no_rows() -> None:
    _, weight, bias = layer(1, 64, 70, torch.float32)
    assert packed_linear(torch.zeros(0, 64), pack(weight), bias, 70).shape == (0, 70)


def test_wrong_tensors_are_refused() -> None:
    x, weight, bias = layer(4, 64, 70, torch.float32)
    packed = pack(weight)
    with pytest.raises(ValueError, match="weight must be"):
        packed_linear(x[:, :32].contiguous(), packed, None, 70)
    with pytest.raises(ValueError, match="does not fit x"):
        packed_linear(x.bfloat16(), packed, None, 70)
    with pytest.raises(ValueError, match="bias must be"):
        packed_linear(x, packed, bias[:3], 70)
    with pytest.raises(ValueError, match="must be even"):
        pack(torch.zeros(4, 3, dtype=torch.bfloat16))


def test_opcheck() -> None:
    x, weight, bias = layer(4, 64, 70, torch.float32)
    torch.library.opcheck(fused_ops.packed_linear, (x, pack(weight), bias, 70, False))


@pytest.mark.slow
def test_a_compiled_function_holds_it_as_one_node() -> None:
    x, weight, bias = layer(4, 64, 70, torch.float32)
    packed = pack(weight)

    def function(x: Tensor) -> Tensor:
        return F.silu(packed_linear(F.silu(x), packed, bias, 70))

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
