"""The fused ops on a GPU as models use them: through `deco_fast.ops`, at sizes of real training.

The other Triton tests, which also run in the interpreter, hold every kernel to the reference; here
is what the interpreter cannot show: many programs at once, streams, autocast, compilation, graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deco_fast import ops
from deco_fast.kernels.pixel_decoder.folding import position_features
from deco_fast.kernels.pixel_decoder.reference import BlockParameters, PixelDecoderParameters
from deco_fast.losses import frequency_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
HIDDEN = 96


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.manual_seed(0)
    with ops.use_backend("triton"):
        yield


class Problem:
    """A decoder of DeCo-XL's shapes but for the width of its tokens, and what it is to decode."""

    def __init__(
        self, dtype: torch.dtype, *, channels: int = 32, blocks: int = 3, patch_size: int = 16
    ) -> None:
        def normal(*shape: int, std: float = 0.3, mean: float = 0) -> Tensor:
            return (mean + std * torch.randn(shape, device="cuda")).requires_grad_()

        c, area = channels, patch_size**2
        self.patch_size = patch_size
        self.upsample = [normal(area * c, HIDDEN, std=HIDDEN**-0.5), normal(area * c)]
        self.inputs = [normal(c, 67), normal(c), normal(c, c), normal(c)]
        self.blocks = [
            BlockParameters(
                *(normal(c, mean=1), normal(c), normal(3 * c, c, std=c**-0.5), normal(3 * c)),
                *(normal(c, c, std=c**-0.5), normal(c), normal(c, c, std=c**-0.5), normal(c)),
            )
            for _ in range(blocks)
        ]
        self.outputs = [normal(3, c), normal(3)]
        side = 256 if patch_size > 1 else 24
        self.x = torch.randn(2, 3, side, side, device="cuda", dtype=dtype, requires_grad=True)
        self.tokens = torch.randn(
            *(2, (side // patch_size) ** 2, HIDDEN), device="cuda", dtype=dtype, requires_grad=True
        )
        self.grad = torch.randn_like(self.x)

    def leaves(self) -> list[Tensor]:
        blocks = [tensor for block in self.blocks for tensor in block]
        return [self.x, self.tokens, *self.upsample, *self.inputs, *blocks, *self.outputs]

    def decode(self, x: Tensor, tokens: Tensor) -> Tensor:
        parameters = PixelDecoderParameters(
            *self.upsample, *self.inputs, tuple(self.blocks), *self.outputs
        )
        return ops.pixel_decoder(x, tokens, parameters, self.patch_size)

    def results(self, decode: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[Tensor]:
        """The velocity and every gradient."""
        velocity = (decode or self.decode)(self.x, self.tokens)
        grads = torch.autograd.grad(velocity, self.leaves(), self.grad.to(velocity.dtype))
        return [velocity.detach(), *grads]

    def expected(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """By the reference in a dtype."""
        exact = object.__new__(Problem)
        exact.patch_size, exact.grad = self.patch_size, self.grad.to(dtype)

        def convert(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        exact.x, exact.tokens = convert(self.x), convert(self.tokens)
        exact.upsample, exact.inputs, exact.outputs = (
            [convert(tensor) for tensor in tensors]
            for tensors in (self.upsample, self.inputs, self.outputs)
        )
        exact.blocks = [BlockParameters(*map(convert, block)) for block in self.blocks]
        with ops.use_backend("reference"):
            return exact.results()

    def assert_close(self, values: list[Tensor], dtype: torch.dtype) -> None:
        """To the reference in float64.

        Of bfloat16 the operands of the products are rounded. Through six blocks, or where few
        pixels average it out, that adds up to more than 1%; the reference in bfloat16, which rounds
        all else too, is then the measure.
        """
        expected = self.expected()
        tolerances = [TOLERANCE[dtype]] * len(expected)
        if dtype == torch.bfloat16:
            errors = map(relative_error, self.expected(dtype), expected)
            tolerances = [max(TOLERANCE[dtype], error) for error in errors]
        assert_close(values, expected, tolerances)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what is expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def assert_close(values: list[Tensor], expected: list[Tensor], tolerances: list[float]) -> None:
    errors = list(map(relative_error, values, expected))
    wrong = [i for i, error in enumerate(errors) if not error <= tolerances[i]]
    assert not wrong, [(i, errors[i], tolerances[i]) for i in wrong]


class TestDecoder:
    @pytest.mark.parametrize("keep", [False, True], ids=["lean", "keeping inputs"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("channels", "blocks"), [(16, 6), (32, 1), (32, 3), (32, 6), (64, 3)])
    def test_velocity_and_gradients(
        self, channels: int, blocks: int, dtype: torch.dtype, keep: bool
    ) -> None:
        problem = Problem(dtype, channels=channels, blocks=blocks)
        with ops.keep_block_inputs(keep):
            problem.assert_close(problem.results(), dtype)

    @pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 32])
    def test_patch_sizes(self, patch_size: int) -> None:
        problem = Problem(torch.bfloat16, patch_size=patch_size)
        problem.assert_close(problem.results(), torch.bfloat16)

    @pytest.mark.parametrize("keep", [False, True])
    def test_the_same_bits_at_every_run(self, keep: bool) -> None:
        problem = Problem(torch.bfloat16)
        with ops.keep_block_inputs(keep):
            first = problem.results()
            for _ in range(3):
                assert all(map(torch.equal, problem.results(), first))

    def test_lean_and_keeping_agree(self) -> None:
        problem = Problem(torch.bfloat16)
        keeping = problem.results()
        with ops.keep_block_inputs(False):
            assert all(map(torch.equal, problem.results(), keeping))

    def test_strided(self) -> None:
        problem = Problem(torch.bfloat16)
        x = problem.x.detach().to(memory_format=torch.channels_last)
        tokens = problem.tokens.detach().transpose(0, 1).contiguous().transpose(0, 1)
        problem.x, problem.tokens = x.requires_grad_(), tokens.requires_grad_()
        problem.grad = problem.grad.to(memory_format=torch.channels_last)
        problem.assert_close(problem.results(), torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype) -> None:
        problem = Problem(torch.float32)
        with torch.autocast("cuda", dtype):
            results = problem.results()
        assert results[0].dtype == dtype
        assert {grad.dtype for grad in results[1:]} == {torch.float32}
        problem.assert_close(results, dtype)

    def test_compiled_as_one_graph(self) -> None:
        problem = Problem(torch.bfloat16)
        compiled = torch.compile(problem.decode, fullgraph=True)
        assert all(map(torch.equal, problem.results(compiled), problem.results()))

    def test_captured_in_a_graph(self) -> None:
        problem = Problem(torch.bfloat16)
        with torch.no_grad():
            expected = problem.decode(problem.x, problem.tokens)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                velocity = problem.decode(problem.x, problem.tokens)
            velocity.zero_()
            graph.replay()
        assert torch.equal(velocity, expected)

    def test_the_first_call_may_be_within_torchs_own_graphs(self) -> None:
        problem = Problem(torch.bfloat16)
        with torch.no_grad():
            expected = problem.decode(problem.x, problem.tokens)
            position_features.cache_clear()
            compiled = torch.compile(problem.decode, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):  # as it is, for the recording, and replayed
                assert torch.equal(compiled(problem.x, problem.tokens), expected)

    def test_the_first_call_is_not_recorded(self) -> None:
        problem = Problem(torch.bfloat16)
        position_features.cache_clear()
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match="call the pixel decoder once before you record"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            problem.decode(problem.x, problem.tokens)

    def test_another_stream(self) -> None:
        problem = Problem(torch.bfloat16)
        expected = problem.results()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = problem.results()
        torch.cuda.current_stream().wait_stream(stream)
        assert all(map(torch.equal, results, expected))

    def test_memory_kept(self) -> None:
        """Between the passes: the condition and two blocks' inputs, or the condition alone."""

        def kept(keep: bool) -> int:
            problem = Problem(torch.bfloat16)
            with ops.keep_block_inputs(keep):
                before = torch.cuda.memory_allocated()
                velocity = problem.decode(problem.x, problem.tokens)
            return torch.cuda.memory_allocated() - before - velocity.nbytes

        kept(True)  # workspaces of libraries, and constants
        condition = 2 * 256 * 256 * 32 * 2
        assert condition <= kept(False) < 1.1 * condition
        assert 3 * condition <= kept(True) < 3.1 * condition

    @pytest.mark.slow
    def test_measured_tiles_compute_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from deco_fast.kernels import tuning

        monkeypatch.setenv("DECO_AUTOTUNE", "1")
        monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "tiles.json")
        monkeypatch.setattr(tuning, "_chosen", {})
        problem = Problem(torch.bfloat16)
        problem.assert_close(problem.results(), torch.bfloat16)
        assert len(tuning._chosen) == 2
        assert (tmp_path / "tiles.json").exists()


class TestLoss:
    def losses(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        table = frequency_table().cuda()
        weight = torch.linspace(0.5, 2, len(prediction), device="cuda")
        losses = ops.flow_matching_loss(prediction, target, table, 0.7, weight)
        return [*losses, *torch.autograd.grad(losses[0], [prediction, target])]

    @pytest.mark.parametrize("size", [(256, 256), (250, 131)])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_and_gradients(self, dtype: torch.dtype, size: tuple[int, int]) -> None:
        shape = 4, 3, *size
        pair = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(2)]
        results = self.losses(*pair)
        with ops.use_backend("reference"):
            expected = self.losses(*(t.detach().double().requires_grad_() for t in pair))
        assert_close(results[:3], expected[:3], [1e-6] * 3)
        assert_close(results[3:], expected[3:], [TOLERANCE[dtype]] * 2)
        again = self.losses(*pair)
        assert all(map(torch.equal, results, again))

    def test_compiled_as_one_graph(self) -> None:
        prediction, target = torch.randn(2, 4, 3, 64, 64, device="cuda").unbind()
        table = frequency_table().cuda()

        def lose(prediction: Tensor) -> Tensor:
            return ops.flow_matching_loss(prediction, target, table, 0.7)[0]

        compiled = torch.compile(lose, fullgraph=True)
        assert torch.equal(compiled(prediction), lose(prediction))

    def test_captured_in_a_graph(self) -> None:
        prediction, target = torch.randn(2, 4, 3, 64, 64, device="cuda").unbind()
        table = frequency_table().cuda()
        (expected, *_) = ops.flow_matching_loss(prediction, target, table, 0.7)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (total, *_) = ops.flow_matching_loss(prediction, target, table, 0.7)
        total.zero_()
        graph.replay()
        assert torch.equal(total, expected)
