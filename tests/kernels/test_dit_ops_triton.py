"""The Triton ops of the DiT block against the reference in float64: results and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor

from deco_fast import ops
from deco_fast.kernels.norm_modulate import reference as norm_reference
from deco_fast.kernels.qk_norm_rope import reference as qk_reference
from deco_fast.kernels.registration import fused_ops
from deco_fast.models.embeddings import rotary_table

DTYPES = [torch.float32, torch.float16]
if not interpreter.INTERPRETED:
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-6

# batch, rows and columns of tokens, heads, head size
HEADS = [
    pytest.param((2, 3, 5, 2, 24), id="golden's"),
    pytest.param((1, 1, 1, 3, 8), id="one token"),
    pytest.param((3, 1, 7, 5, 72), id="DeCo-XL's heads"),
    pytest.param((1, 4, 4, 4, 64), id="DeCo-L's heads"),
    pytest.param((1, 2, 3, 1, 128), id="largest heads"),
]
# batch, tokens, width
WIDTHS = [
    pytest.param((2, 5, 96), id="golden's"),
    pytest.param((1, 1, 8), id="one token"),
    pytest.param((3, 19, 1000), id="no power of two"),
    pytest.param((2, 8, 1024), id="DeCo-L's width"),
    pytest.param((1, 3, 2050), id="wide"),
]


def normal(*shape: int, mean: float = 0) -> Tensor:
    return torch.randn(shape, device=interpreter.DEVICE) + mean


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what is expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Memory that is allocated without a value holds NaN, so that nothing may stay unwritten."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: list[Tensor],
    constants: tuple[object, ...],
) -> None:
    """Hold the op's results and its gradients to the reference's in float64."""

    def results(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*leaves, *constants)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        grads = [normal(*value.shape).to(value.dtype) for value in out]
        return [*(value.detach() for value in out), *torch.autograd.grad(out, leaves, grads)]

    with ops.use_backend("triton"):
        ours = results(op, inputs)
    expected = results(reference, [tensor.double() for tensor in inputs])
    outputs = len(ours) - len(inputs)
    for i, (value, exact) in enumerate(zip(ours, expected, strict=True)):
        assert value.shape == exact.shape
        assert value.dtype == (inputs[0] if i < outputs else inputs[i - outputs]).dtype
        assert relative_error(value, exact) < TOLERANCE[inputs[0].dtype], i


@pytest.mark.usefixtures("_poisoned_memory")
class TestQueriesAndKeys:
    __test__ = interpreter.KERNELS_RUN
    pytestmark = interpreter.MARKS

    def inputs(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[list[Tensor], tuple[Tensor, float]]:
        batch, rows, columns, heads, size = shape
        qkv = normal(batch, rows * columns, 3 * heads * size).to(dtype)
        rotary = rotary_table(rows, columns, size).to(interpreter.DEVICE)
        return [qkv, normal(size, mean=1), normal(size, mean=1)], (rotary, EPS)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", HEADS)
    def test_results_and_gradients(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        inputs, constants = self.inputs(shape, dtype)
        check(ops.qk_norm_rope, qk_reference.qk_norm_rope, inputs, constants)

    def test_more_rows_than_programs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from deco_fast.kernels.qk_norm_rope import gpu

        monkeypatch.setattr(gpu, "PROGRAMS", 2)
        inputs, constants = self.inputs((2, 7, 9, 3, 8), torch.float32)
        check(ops.qk_norm_rope, qk_reference.qk_norm_rope, inputs, constants)

    def test_strided(self) -> None:
        inputs, constants = self.inputs((2, 3, 5, 2, 24), torch.float32)
        inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
        check(ops.qk_norm_rope, qk_reference.qk_norm_rope, inputs, constants)

    def test_attention_takes_them_as_they_are(self) -> None:
        inputs, constants = self.inputs((2, 3, 5, 2, 24), torch.float32)
        with ops.use_backend("triton"):
            for tensor in ops.qk_norm_rope(*inputs, *constants):
                assert tensor.transpose(1, 2).is_contiguous()

    def test_no_image(self) -> None:
        inputs, constants = self.inputs((0, 3, 5, 2, 24), torch.float32)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        with ops.use_backend("triton"):
            q, k, v = ops.qk_norm_rope(*inputs, *constants)
            (q.sum() + k.sum() + v.sum()).backward()
        assert q.shape == (0, 2, 15, 24)
        assert inputs[1].grad is not None
        assert inputs[1].grad.count_nonzero() == 0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_op_is_what_its_fake_says(self, dtype: torch.dtype) -> None:
        inputs, constants = self.inputs((1, 2, 3, 2, 24), dtype)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        torch.library.opcheck(fused_ops.qk_norm_rope, (*leaves, *constants))
        q, k, v = fused_ops.qk_norm_rope(*inputs, *constants)
        detached = [tensor.detach() for tensor in (q, k, v, *inputs)]
        torch.library.opcheck(fused_ops.qk_norm_rope_backward, (*detached, *constants))


@pytest.mark.usefixtures("_poisoned_memory")
class TestNormModulate:
    __test__ = interpreter.KERNELS_RUN
    pytestmark = interpreter.MARKS

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        batch, _, width = shape
        shift, scale = normal(batch, 1, 2 * width).to(dtype).chunk(2, dim=-1)
        return [normal(*shape).to(dtype), normal(width, mean=1), shift, scale]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", WIDTHS)
    def test_results_and_gradients(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        inputs = self.inputs(shape, dtype)
        check(ops.norm_modulate, norm_reference.norm_modulate, inputs, (EPS,))

    def test_more_chunks_than_are_reduced_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from deco_fast.kernels.norm_modulate import gpu

        monkeypatch.setattr(gpu, "TOKENS", 1)
        inputs = self.inputs((2, 37, 40), torch.float32)
        check(ops.norm_modulate, norm_reference.norm_modulate, inputs, (EPS,))

    def test_strided(self) -> None:
        inputs = self.inputs((2, 5, 96), torch.float32)
        inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
        check(ops.norm_modulate, norm_reference.norm_modulate, inputs, (EPS,))

    def test_no_image(self) -> None:
        inputs = [tensor.requires_grad_() for tensor in self.inputs((0, 3, 16), torch.float32)]
        with ops.use_backend("triton"):
            y = ops.norm_modulate(*inputs, EPS)
            y.sum().backward()
        assert y.shape == (0, 3, 16)
        assert inputs[1].grad is not None
        assert inputs[1].grad.count_nonzero() == 0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_op_is_what_its_fake_says(self, dtype: torch.dtype) -> None:
        inputs = self.inputs((2, 5, 96), dtype)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        torch.library.opcheck(fused_ops.norm_modulate, (*leaves, EPS))
        grad = torch.randn_like(inputs[0])
        torch.library.opcheck(fused_ops.norm_modulate_backward, (grad, *inputs, EPS))


class TestBehaviour:
    __test__ = interpreter.KERNELS_RUN
    pytestmark = interpreter.MARKS

    def test_the_same_bits_at_every_run(self) -> None:
        x, weight = normal(2, 37, 48).requires_grad_(), normal(48).requires_grad_()
        head = normal(8).requires_grad_()
        rotary = rotary_table(1, 37, 8).to(interpreter.DEVICE)
        shift, scale = normal(2, 2, 1, 48).unbind()

        def gradients() -> tuple[Tensor, ...]:
            with ops.use_backend("triton"):
                y = ops.norm_modulate(x, weight, shift, scale, EPS)
                q, k, v = ops.qk_norm_rope(y, head, head, rotary, EPS)
                return torch.autograd.grad((q * k).sum() + v.sum(), [x, weight, head])

        assert all(map(torch.equal, gradients(), gradients()))

    def test_shapes_that_do_not_fit_are_errors(self) -> None:
        """The kernels go by pointers: they would read what is not ours."""
        x, weight, modulation = normal(3, 5, 8), normal(8), normal(3, 1, 8)
        with pytest.raises(ValueError, match=r"weight must be \(8,\), not \(4,\)"):
            fused_ops.norm_modulate(x, weight[:4], modulation, modulation, EPS)
        with pytest.raises(ValueError, match=r"shift must be \(3, 1, 8\), not \(3, 8\)"):
            fused_ops.norm_modulate(x, weight, modulation[:, 0], modulation, EPS)
        with pytest.raises(ValueError, match=r"scale must be \(3, 1, 8\), not \(1, 1, 8\)"):
            fused_ops.norm_modulate(x, weight, modulation, modulation[:1], EPS)
        qkv, head, rotary = normal(2, 6, 3 * 8), normal(4), rotary_table(2, 3, 4)
        rotary = rotary.to(interpreter.DEVICE)
        with pytest.raises(ValueError, match="rotary must be"):
            fused_ops.qk_norm_rope(qkv, head, head, rotary[:5], EPS)
        with pytest.raises(ValueError, match="k_weight must be"):
            fused_ops.qk_norm_rope(qkv, head, head[:3], rotary, EPS)
        with pytest.raises(ValueError, match="qkv must be"):
            fused_ops.qk_norm_rope(qkv[..., :23], head, head, rotary, EPS)

    @pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 8), (1, 5, 8)], ids=str)
    def test_other_modulations_than_one_for_each_image(self, shape: tuple[int, ...]) -> None:
        x, weight, shift, scale = normal(3, 5, 8), normal(8), normal(*shape), normal(*shape)
        with ops.use_backend("triton"):
            y = ops.norm_modulate(x, weight, shift, scale, EPS)
        expected = norm_reference.norm_modulate(x, weight, shift, scale, EPS)
        assert relative_error(y, expected) < TOLERANCE[torch.float32]

    def test_a_second_derivative_is_a_clear_error(self) -> None:
        x, weight = normal(1, 3, 8).requires_grad_(), normal(8)
        shift, scale = normal(2, 1, 1, 8).unbind()
        with ops.use_backend("triton"):
            y = ops.norm_modulate(x, weight, shift, scale, EPS)
            (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            with pytest.raises(NotImplementedError, match="norm_modulate cannot be differ"):
                grad.sum().backward()

    def test_a_transform_takes_the_reference(self) -> None:
        x, weight = normal(1, 3, 8), normal(8)
        shift, scale = normal(2, 1, 1, 8).unbind()

        def value(x: Tensor) -> Tensor:
            return ops.norm_modulate(x, weight, shift, scale, EPS).square().sum()

        with ops.use_backend("triton"):
            gradient = torch.func.grad(value)(x)
        with ops.use_backend("reference"):
            assert torch.equal(gradient, torch.func.grad(value)(x))

    def test_the_compiler_sees_the_norm_and_not_the_op(self) -> None:
        x, weight = normal(1, 3, 8).requires_grad_(), normal(8)
        shift, scale = normal(2, 1, 1, 8).unbind()
        seen: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        @torch.compile(backend=backend, fullgraph=True)
        def compiled(x: Tensor) -> Tensor:
            return ops.norm_modulate(x, weight, shift, scale, EPS)

        with ops.use_backend("triton"):
            y = compiled(x)
        assert seen and not any("deco_fast" in target for target in seen)
        assert torch.equal(y, norm_reference.norm_modulate(x, weight, shift, scale, EPS))


class TestSwiGLU:
    @pytest.mark.parametrize("width", [16, 21])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_joined_products_are_the_separate_ones(self, width: int, autocast: bool) -> None:
        from deco_fast.kernels.swiglu import joined, reference

        torch.manual_seed(0)
        leaves = [torch.randn(2, 3, 8), *torch.randn(2, width, 8), torch.randn(8, width)]
        leaves = [leaf.requires_grad_() for leaf in leaves]

        def results(function: Callable[..., Tensor]) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = function(*leaves)
            return [y.detach(), *torch.autograd.grad(y.float().sin().sum(), leaves)]

        tolerance = 2e-2 if autocast else 1e-5
        for value, expected in zip(results(joined.swiglu), results(reference.swiglu), strict=True):
            assert value.dtype == expected.dtype
            assert relative_error(value, expected) < tolerance


@pytest.mark.slow
@pytest.mark.skipif(interpreter.INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    interpreter.run_cases(__file__)
