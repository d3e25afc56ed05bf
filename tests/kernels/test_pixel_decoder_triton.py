"""The Triton pixel decoder against the reference in float64: the velocity and every gradient."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import pytest
import torch
from torch import Tensor

from deco_fast.kernels.pixel_decoder.reference import (
    BlockParameters,
    PixelDecoderParameters,
    pixel_decoder,
)
from deco_fast.kernels.registration import fused_ops

if interpreter.KERNELS_RUN:
    from deco_fast.kernels.pixel_decoder import gpu
    from deco_fast.kernels.pixel_decoder.gpu_tiles import candidates

TOKEN_WIDTH = 24
DTYPES = [torch.float32, torch.float16]
if not interpreter.INTERPRETED:
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}

# channels, blocks, patch size, batch, rows and columns of patches
SHAPES = [
    pytest.param((32, 3, 16, 2, 1, 1), id="DeCo-XL"),
    pytest.param((16, 2, 1, 2, 5, 7), id="one pixel per patch, an odd number of them"),
    pytest.param((16, 6, 2, 3, 3, 5), id="most blocks"),
    pytest.param((64, 1, 4, 1, 3, 3), id="most channels, one block"),
    pytest.param((32, 2, 8, 1, 1, 3), id="patches as large as a tile"),
    pytest.param((16, 1, 32, 1, 1, 1), id="largest patch"),
]


class Case:
    """Random inputs and parameters, and what the reference makes of them in float64."""

    def __init__(
        self,
        channels: int,
        blocks: int,
        patch_size: int,
        batch: int,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        position: str = "product",
    ) -> None:
        def normal(*shape: int, std: float = 0.3) -> Tensor:
            return torch.randn(shape, device=interpreter.DEVICE) * std

        c, area = channels, patch_size**2
        self.patch_size, self.position = patch_size, position
        self.x = normal(batch, 3, rows * patch_size, columns * patch_size, std=1).to(dtype)
        self.tokens = normal(batch, rows * columns, TOKEN_WIDTH, std=1).to(dtype)
        self.grad_velocity = torch.randn_like(self.x)
        self.upsample = [normal(area * c, TOKEN_WIDTH), normal(area * c)]
        self.small = [normal(c, 67), normal(c), normal(c, c), normal(c)]
        for _ in range(blocks):
            self.small += [1 + normal(c), normal(c), normal(3 * c, c, std=c**-0.5), normal(3 * c)]
            self.small += [normal(c, c, std=c**-0.5), normal(c)] * 2
        self.small += [normal(3, c), normal(3)]

    def forward(self, keep_inputs: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The velocity, and what the backward pass is to be given of the forward pass."""
        velocity, *kept = gpu.forward(
            *(self.x, self.tokens, *self.upsample, self.small),
            *(self.patch_size, self.position, True, keep_inputs),
        )
        return velocity, kept

    def backward(self, kept: list[Tensor], need_x_grad: bool = True) -> list[Tensor]:
        """The gradients of x, the tokens, the upsampling and the small parameters."""
        grad_x, *grads, grad_small = gpu.backward(
            *(self.grad_velocity, self.x, self.tokens, *kept, *self.upsample),
            *(self.small, self.patch_size, self.position, need_x_grad),
        )
        return [grad_x, *grads, *grad_small]

    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
        """By the reference in a dtype."""
        inputs = [
            tensor.detach().to(dtype).requires_grad_()
            for tensor in (self.x, self.tokens, *self.upsample, *self.small)
        ]
        x, tokens, *upsample = inputs[:4]
        first, blocks, last = inputs[4:8], inputs[8:-2], inputs[-2:]
        parameters = PixelDecoderParameters(
            *upsample,
            *first,
            tuple(BlockParameters(*blocks[i : i + 8]) for i in range(0, len(blocks), 8)),
            *last,
        )
        velocity = pixel_decoder(x, tokens, parameters, self.patch_size, self.position)
        grads = torch.autograd.grad(velocity, inputs, self.grad_velocity.to(dtype))
        return velocity.detach(), list(grads)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what is expected."""
    return float((value.double() - expected).norm() / expected.norm())


def tolerances(case: Case, expected: list[Tensor]) -> list[float]:
    """The relative error that each result may have.

    Of bfloat16 the operands of the products are rounded. Through six blocks, or where few pixels
    average it out, that adds up to more than 1%; the reference in bfloat16, which rounds all else
    too, is then the measure.
    """
    tolerance = TOLERANCE[case.tokens.dtype]
    if case.tokens.dtype != torch.bfloat16:
        return [tolerance] * len(expected)
    velocity, grads = case.expected(torch.bfloat16)
    errors = map(relative_error, (velocity, *grads), expected)
    return [max(tolerance, error) for error in errors]


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Memory that is allocated without a value holds NaN, so that nothing may stay unwritten."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
class TestAgainstTheReference:
    __test__ = interpreter.KERNELS_RUN
    pytestmark = interpreter.MARKS

    def check(self, case: Case, keep_inputs: bool = True) -> None:
        expected_velocity, expected_grads = case.expected()
        allowed = tolerances(case, [expected_velocity, *expected_grads])
        velocity, kept = case.forward(keep_inputs)
        grads = case.backward(kept)
        assert velocity.dtype == case.tokens.dtype
        assert relative_error(velocity, expected_velocity) <= allowed[0]
        parameters = [case.x, case.tokens, *case.upsample, *case.small]
        for i, (grad, expected) in enumerate(zip(grads, expected_grads, strict=True)):
            assert (grad.dtype, grad.shape) == (parameters[i].dtype, parameters[i].shape)
            assert relative_error(grad, expected) <= allowed[1 + i], i

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_velocity_and_gradients(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.check(Case(*shape, dtype))

    @pytest.mark.skipif(interpreter.INTERPRETED, reason="the interpreter's bfloat16 is wrong")
    @pytest.mark.parametrize("shape", SHAPES)
    def test_bfloat16_over_eight_draws(self, shape: tuple[int, ...]) -> None:
        """Of few pixels the error in bfloat16 is a draw of noise, as the reference's is. Eight
        draws as one tell a kernel that rounds more than the reference from one that was unlucky."""
        draws = []
        for _ in range(8):
            case = Case(*shape, torch.bfloat16)
            velocity, kept = case.forward()
            fused = [velocity, *case.backward(kept)]
            (exact, exact_grads), (rounded, rounded_grads) = map(
                case.expected, (torch.float64, torch.bfloat16)
            )
            triples = zip(fused, [rounded, *rounded_grads], [exact, *exact_grads], strict=True)
            draws.append(list(triples))
        for i, results in enumerate(zip(*draws, strict=True)):
            triton, reference, expected = map(torch.stack, zip(*results, strict=True))
            allowed = max(TOLERANCE[torch.bfloat16], relative_error(reference, expected))
            assert relative_error(triton, expected) <= allowed, i

    @pytest.mark.parametrize("keep_inputs", [False, True])
    @pytest.mark.parametrize("blocks", [1, 3])
    def test_several_shares_of_the_pixels(
        self, blocks: int, keep_inputs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu, "PIXELS_AT_A_TIME", 256)
        self.check(Case(16, blocks, 8, 1, 3, 3, torch.float32), keep_inputs)

    @pytest.mark.parametrize("candidate", [1, -1])
    def test_other_tiles_than_the_tables(
        self, candidate: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What DECO_AUTOTUNE may choose."""
        monkeypatch.setattr(gpu, "_choose", lambda *args: candidates(args[3])[candidate])
        self.check(Case(16, 2, 8, 1, 3, 3, torch.float32))

    @pytest.mark.parametrize("shape", SHAPES[:3])
    def test_lean(self, shape: tuple[int, ...]) -> None:
        self.check(Case(*shape, torch.float32), keep_inputs=False)

    def test_axial_position_features(self) -> None:
        self.check(Case(16, 1, 8, 1, 1, 3, torch.float32, "axial"))

    def test_mixed_dtypes_and_strides(self) -> None:
        case = Case(16, 1, 4, 2, 3, 3, torch.float16)
        case.x = case.x.float().transpose(2, 3)
        case.tokens = case.tokens.transpose(0, 1).contiguous().transpose(0, 1)
        case.grad_velocity = case.grad_velocity.to(memory_format=torch.channels_last)
        case.small = [
            parameter.half().mT.contiguous().mT if parameter.ndim == 2 else parameter.half()
            for parameter in case.small
        ]
        self.check(case)


class TestBehaviour:
    __test__ = interpreter.KERNELS_RUN
    pytestmark = interpreter.MARKS

    @pytest.mark.parametrize("keep_inputs", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_op_is_what_its_fake_says(self, dtype: torch.dtype, keep_inputs: bool) -> None:
        case = Case(16, 2, 2, 1, 3, 5, dtype)
        arguments = (
            *(case.x, case.tokens, *case.upsample, case.small),
            *(case.patch_size, case.position, True, keep_inputs),
        )
        torch.library.opcheck(fused_ops.pixel_decoder, arguments)
        velocity, *kept = fused_ops.pixel_decoder(*arguments)
        torch.library.opcheck(
            fused_ops.pixel_decoder_backward,
            (velocity, case.x, case.tokens, *kept, *arguments[2:-2], True),
        )

    def test_without_a_backward_pass_nothing_is_kept(self) -> None:
        case = Case(16, 2, 2, 1, 3, 5, DTYPES[0])
        arguments = (
            *(case.x, case.tokens, *case.upsample, case.small),
            *(case.patch_size, case.position, False, False),
        )
        torch.library.opcheck(fused_ops.pixel_decoder, arguments)
        velocity, *kept = fused_ops.pixel_decoder(*arguments)
        assert torch.equal(velocity, case.forward(keep_inputs=False)[0])
        assert [tensor.numel() for tensor in kept] == [0, 0]

    def test_the_same_bits_at_every_run(self) -> None:
        case = Case(16, 2, 4, 1, 3, 5, torch.float16)
        (velocity, kept), (again, _) = case.forward(), case.forward()
        assert torch.equal(velocity, again)
        for grad, grad_again in zip(case.backward(kept), case.backward(kept), strict=True):
            assert torch.equal(grad, grad_again)

    def test_no_gradient_of_x_where_none_is_asked_for(self) -> None:
        case = Case(16, 1, 4, 1, 1, 3, torch.float32)
        _, kept = case.forward()
        with_x, without_x = case.backward(kept), case.backward(kept, need_x_grad=False)
        assert without_x[0].numel() == 0
        for grad, grad_with_x in zip(without_x[1:], with_x[1:], strict=True):
            assert torch.equal(grad, grad_with_x)

    def test_no_image(self) -> None:
        case = Case(16, 1, 4, 0, 2, 2, torch.float32)
        velocity, kept = case.forward()
        assert velocity.shape == (0, 3, 8, 8)
        assert all(grad.count_nonzero() == 0 for grad in case.backward(kept))

    def test_shapes_that_do_not_fit_are_errors(self) -> None:
        """The kernels go by pointers: they would read what is not ours."""
        for name, wrong in (
            ("x", lambda case: case.x[..., :-1]),
            ("tokens", lambda case: case.tokens[:, 1:]),
            ("x", lambda case: case.x[1:]),
        ):
            case = Case(16, 1, 4, 2, 2, 3, torch.float32)
            setattr(case, name, wrong(case))
            with pytest.raises(ValueError, match=r"must be \(.*\), not"):
                case.forward()
        case = Case(16, 1, 4, 2, 2, 3, torch.float32)
        case.small[6] = case.small[6][:32]
        with pytest.raises(ValueError, match=r"parameter 6 .* must be \(48, 16\), not \(32, 16\)"):
            case.forward()

    @pytest.mark.parametrize(
        ("channels", "blocks", "patch_size"), [(24, 1, 4), (16, 7, 4), (16, 1, 3)]
    )
    def test_shapes_without_a_kernel(self, channels: int, blocks: int, patch_size: int) -> None:
        case = Case(channels, blocks, patch_size, 1, 1, 1, torch.float32)
        with pytest.raises(ValueError, match=r"the Triton pixel decoder takes"):
            case.forward()

    @pytest.mark.gpu
    @pytest.mark.slow
    def test_more_elements_than_32_bits_count(self) -> None:
        """The last image of a batch with more than 2³¹ elements in y, against that image alone."""
        case = Case(16, 1, 16, 2200, 16, 16, torch.bfloat16)
        velocity, kept = case.forward()
        assert kept[0].numel() > 2**31
        grad_x, grad_tokens, *_ = case.backward(kept)
        case.x, case.tokens, case.grad_velocity = (
            tensor[-1:] for tensor in (case.x, case.tokens, case.grad_velocity)
        )
        last_velocity, kept = case.forward()
        assert relative_error(velocity[-1:], last_velocity.double()) < 1e-2
        last_grad_x, last_grad_tokens, *_ = case.backward(kept)
        assert relative_error(grad_x[-1:], last_grad_x.double()) < 1e-2
        assert relative_error(grad_tokens[-1:], last_grad_tokens.double()) < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(interpreter.INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    interpreter.run_cases(__file__)
