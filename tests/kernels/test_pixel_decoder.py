"""The C++ pixel decoder against the reference in float64: the velocity and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deco_fast import ops
from deco_fast.errors import UserError
from deco_fast.kernels import registry
from deco_fast.kernels.pixel_decoder import reference
from deco_fast.kernels.pixel_decoder.folding import position_features
from deco_fast.kernels.pixel_decoder.reference import (
    BlockParameters,
    PixelDecoderParameters,
    PositionKind,
)

pytestmark = pytest.mark.skipif(
    registry.extension_problem() is not None,
    reason=f"the C++ backend is not available: {registry.extension_problem()}",
)

TOKEN_WIDTH = 24
# Root mean square of the error over that of the values.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Shape(NamedTuple):
    channels: int
    blocks: int
    patch_size: int
    batch: int
    rows: int
    columns: int


DECO_XL = Shape(32, 3, 16, 2, 4, 4)
SHAPES = [
    pytest.param(DECO_XL, id="DeCo-XL, one full tile"),
    pytest.param(Shape(16, 2, 1, 2, 9, 7), id="one pixel per patch, a tile that is not full"),
    pytest.param(Shape(16, 6, 2, 3, 3, 5), id="most blocks"),
    pytest.param(Shape(64, 1, 4, 1, 7, 11), id="most channels, one block"),
    pytest.param(Shape(32, 2, 8, 1, 1, 3), id="fewer tokens than lanes"),
    pytest.param(Shape(16, 1, 32, 1, 2, 1), id="largest patch"),
]


class Case:
    """Random inputs and parameters, exact in the dtype of the computation."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, position: PositionKind = "product"
    ) -> None:
        def normal(*sizes: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
            return (mean + torch.randn(sizes) * std).to(dtype).float()

        c, p = shape.channels, shape.patch_size
        self.patch_size = p
        self.position: PositionKind = position
        x = normal(shape.batch, 3, shape.rows * p, shape.columns * p, std=1).to(dtype)
        tokens = normal(shape.batch, shape.rows * shape.columns, TOKEN_WIDTH, std=1).to(dtype)
        upsample = [normal(p * p * c, TOKEN_WIDTH), normal(p * p * c)]
        projections = [normal(c, 67), normal(c), normal(c, c), normal(c)]
        blocks: list[Tensor] = []
        for _ in range(shape.blocks):
            blocks += [normal(c, mean=1), normal(c), normal(3 * c, c, std=c**-0.5), normal(3 * c)]
            blocks += [normal(c, c, std=c**-0.5), normal(c), normal(c, c, std=c**-0.5), normal(c)]
        output = [normal(3, c), normal(3)]
        self.inputs = [x, tokens, *upsample, *projections, *blocks, *output]
        self.grad_velocity = torch.randn_like(x)

    def parameters(self, tensors: list[Tensor]) -> PixelDecoderParameters:
        """Those of the op, from all of its differentiable tensors."""
        _, _, *rest = tensors
        blocks = tuple(
            BlockParameters(*rest[start : start + 8]) for start in range(6, len(rest) - 2, 8)
        )
        return PixelDecoderParameters(*rest[:6], blocks, *rest[-2:])

    def cpp(self, inputs: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The velocity and the gradients of all inputs."""
        leaves = [t.detach().requires_grad_() for t in inputs or self.inputs]
        with ops.use_backend("cpp"):
            velocity = ops.pixel_decoder(
                *leaves[:2], self.parameters(leaves), self.patch_size, self.position
            )
            grads = torch.autograd.grad(velocity, leaves, self.grad_velocity)
        return (velocity.detach(), *grads)

    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The same by the reference, all in one dtype."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.inputs]
        velocity = reference.pixel_decoder(
            *leaves[:2], self.parameters(leaves), self.patch_size, self.position
        )
        grads = torch.autograd.grad(velocity, leaves, self.grad_velocity.to(dtype))
        return (velocity.detach(), *grads)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    outputs = zip(case.cpp(), case.expected(), case.expected(dtype), strict=True)
    for index, (result, expected, eager) in enumerate(outputs):
        assert result.shape == expected.shape
        assert result.dtype == (dtype if index < 3 else torch.float32)
        tolerance = TOLERANCE[dtype]
        if dtype == torch.bfloat16:
            # The operands of the products are rounded. Through six blocks, or where few pixels
            # average it out, that adds up to more; the reference in bfloat16, which rounds all
            # else too, is then at least as far off.
            tolerance = max(tolerance, relative_error(eager, expected))
        assert relative_error(result, expected) <= tolerance, f"output {index}"


def test_constants_are_not_made_in_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the pixel decoder once before you record it"):
        position_features(4, torch.device("cuda"), "product")
    assert position_features(4, torch.device("cpu"), "product").shape == (16, 64)


def test_axial_position_features() -> None:
    case = Case(Shape(32, 2, 8, 1, 3, 5), torch.float32, "axial")
    results, product = case.cpp(), Case(Shape(32, 2, 8, 1, 3, 5), torch.float32)
    for result, expected in zip(results, case.expected(), strict=True):
        assert relative_error(result, expected) <= TOLERANCE[torch.float32]
    product.inputs = case.inputs
    assert relative_error(product.cpp()[0], results[0].double()) > 0.01


class TestShares:
    """Some pixels of each patch at a time."""

    @pytest.mark.usefixtures("instruction_set")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("pixels", [1, 3, 15])
    def test_many_shares_and_a_last_one_that_is_smaller(
        self, pixels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from deco_fast.kernels.pixel_decoder import cpu

        shape = Shape(32, 2, 4, 2, 3, 7)
        case = Case(shape, dtype)
        tokens = shape.batch * shape.rows * shape.columns
        share = pixels * shape.channels * tokens * dtype.itemsize
        monkeypatch.setattr(cpu, "_SHARE_BYTES", share)
        for result, expected in zip(case.cpp(), case.expected(), strict=True):
            assert relative_error(result, expected) < TOLERANCE[dtype]

    def test_the_sum_over_shares_is_not_rounded_at_each(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from deco_fast.kernels.pixel_decoder import cpu

        case = Case(Shape(32, 1, 16, 1, 4, 4), torch.bfloat16)
        monkeypatch.setattr(cpu, "_SHARE_BYTES", 1)  # 256 shares of a pixel
        grad_tokens, expected = case.cpp()[2], case.expected()[2]
        assert relative_error(grad_tokens, expected) < 5e-3

    def test_without_gradients_no_more_than_a_share_exists(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from deco_fast.kernels.pixel_decoder import cpu

        case = Case(Shape(32, 1, 8, 1, 4, 4), torch.float32)
        expected = case.cpp()[0]
        multiply, made = cpu.matmul, list[int]()

        def watched(a: Tensor, b: Tensor, out: Tensor) -> None:
            made.append(len(a))
            assert out.untyped_storage().nbytes() == 5 * 32 * 16 * 4
            multiply(a, b, out)

        monkeypatch.setattr(cpu, "matmul", watched)
        monkeypatch.setattr(cpu, "_SHARE_BYTES", 5 * 32 * 16 * 4)
        with ops.use_backend("cpp"), torch.no_grad():
            velocity = ops.pixel_decoder(
                *case.inputs[:2], case.parameters(case.inputs), case.patch_size
            )
        assert relative_error(velocity, expected.double()) < 1e-6
        assert made == [5 * 32] * 12 + [4 * 32]


def test_long_sums_stay_exact() -> None:
    """Each weight gradient adds up 131,072 pixels."""
    case = Case(Shape(16, 1, 32, 2, 8, 8), torch.float32)
    for result, expected in zip(case.cpp(), case.expected(), strict=True):
        assert relative_error(result, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [Shape(32, 2, 16, 2, 4, 5), Shape(16, 1, 1, 1, 20, 10)],
    ids=["chunks of pixels", "chunks of tokens"],
)
def test_the_number_of_threads_changes_no_bit(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deco_fast import _C

    # The library's products may differ by the number of threads, and are not ours.
    monkeypatch.setattr(_C, "prefers_matmul", lambda a: True)
    case = Case(shape, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(case.cpp())
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(dtype: torch.dtype) -> None:
    case = Case(Shape(16, 1, 4, 2, 3, 4), dtype)
    expected = case.cpp()
    strided = [torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0] for t in case.inputs]
    assert not any(t.is_contiguous() for t in strided if t.numel() > 1)
    case.grad_velocity = case.grad_velocity.mT.contiguous().mT
    # Libraries may take another product for strided operands, which rounds otherwise.
    for result, contiguous in zip(case.cpp(strided), expected, strict=True):
        assert relative_error(result, contiguous) < 1e-6


@pytest.mark.usefixtures("instruction_set")
def test_conditions_that_saturate() -> None:
    """silu and its derivative have no overflow on the way, for values of ±1000 and beyond."""
    case = Case(Shape(16, 1, 2, 1, 6, 6), torch.float32)
    case.inputs[1] = case.inputs[1] * 1000
    for result, expected in zip(case.cpp(), case.expected(), strict=True):
        assert relative_error(result, expected) < 1e-4


@pytest.mark.usefixtures("instruction_set")
def test_the_most_negative_conditions_are_none() -> None:
    """silu is 0 there, and no small number times a large one."""
    case = Case(Shape(16, 1, 2, 1, 6, 6), torch.float32)
    for scale in (-1e20, -1e38):
        case.inputs[1] = torch.full_like(case.inputs[1], 0.0)
        case.inputs[3] = torch.full_like(case.inputs[3], scale)  # the upsampling's bias
        velocity, expected = case.cpp()[0], case.expected()[0]
        assert relative_error(velocity, expected) < 1e-5


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_with_its_token(dtype: torch.dtype) -> None:
    case = Case(Shape(16, 2, 4, 1, 5, 7), dtype)
    case.inputs[1][0, 9] = torch.nan
    velocity = case.cpp()[0].isnan()
    expected = torch.zeros_like(velocity)
    expected[:, :, 4:8, 8:12] = True
    assert torch.equal(velocity, expected)


def test_gradient_of_x_only_where_asked_for() -> None:
    case = Case(Shape(16, 1, 4, 1, 3, 3), torch.float32)
    _, _, *expected = case.cpp()
    x, *leaves = [t.detach().requires_grad_() for t in case.inputs]
    with ops.use_backend("cpp"):
        parameters = case.parameters([x, *leaves])
        velocity = ops.pixel_decoder(x.detach(), leaves[0], parameters, case.patch_size)
        result = torch.autograd.grad(velocity, leaves, case.grad_velocity)
    torch.testing.assert_close(result, tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_nothing_but_y_for_the_backward_pass(dtype: torch.dtype) -> None:
    shape = Shape(32, 3, 8, 1, 4, 4)
    case = Case(shape, dtype)
    leaves = [t.requires_grad_() for t in case.inputs]
    given = {t.untyped_storage().data_ptr() for t in leaves}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        ops.use_backend("cpp"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        velocity = ops.pixel_decoder(*leaves[:2], case.parameters(leaves), case.patch_size)
    assert velocity.requires_grad
    pixels = shape.batch * shape.rows * shape.columns * shape.patch_size**2
    assert sum(kept.values()) == pixels * shape.channels * dtype.itemsize


def test_no_image() -> None:
    case = Case(Shape(16, 1, 4, 0, 2, 2), torch.float32)
    velocity, *grads = case.cpp()
    assert velocity.shape == (0, 3, 8, 8)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in case.inputs]
    assert not any(grad.count_nonzero() for grad in grads)


@pytest.mark.parametrize("position", ["product", "axial"])
def test_the_default_dtype_changes_nothing(position: str) -> None:
    expected = reference.pixel_position_features(4, kind=position)
    torch.set_default_dtype(torch.bfloat16)
    try:
        features = reference.pixel_position_features(4, kind=position)
    finally:
        torch.set_default_dtype(torch.float32)
    assert features.dtype == torch.float32 and torch.equal(features, expected)


def test_other_widths_go_to_the_reference() -> None:
    case = Case(Shape(24, 1, 2, 1, 2, 3), torch.float32)
    for result, expected in zip(case.cpp(), case.expected(), strict=True):
        assert relative_error(result, expected) < TOLERANCE[torch.float32]


def test_an_unknown_instruction_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECO_ISA", "mmx")
    case = Case(Shape(16, 1, 2, 1, 2, 3), torch.float32)
    with pytest.raises((UserError, ValueError), match=r"^DECO_ISA: unknown .*'mmx'.*$"):
        case.cpp()
