"""The registered ops as PyTorch handles them: opcheck, compile, autocast, transforms, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deco_fast import ops
from deco_fast.errors import UserError
from deco_fast.kernels import registry
from deco_fast.kernels.pixel_decoder.reference import BlockParameters, PixelDecoderParameters
from deco_fast.kernels.registration import fused_ops
from deco_fast.losses import frequency_table

pytestmark = pytest.mark.skipif(
    "cpp" not in registry._implementations["pixel_decoder"],
    reason=f"the C++ backend is not available: {registry.extension_problem()}",
)

PATCH, CHANNELS, HIDDEN, BLOCKS = 4, 16, 24, 2


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    with ops.use_backend("cpp"):
        yield


def parameters(dtype: torch.dtype = torch.float32) -> PixelDecoderParameters:
    def tensor(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape)).to(dtype).requires_grad_()

    c = CHANNELS
    block_shapes = BlockParameters(  # type: ignore[arg-type]
        *((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c, c), (c,))
    )
    return PixelDecoderParameters(
        tensor(PATCH**2 * c, HIDDEN),
        tensor(PATCH**2 * c),
        *(tensor(c, 67), tensor(c), tensor(c, c), tensor(c)),
        tuple(BlockParameters(*(tensor(*shape) for shape in block_shapes)) for _ in range(BLOCKS)),
        *(tensor(3, c), tensor(3)),
    )


def flat(p: PixelDecoderParameters) -> list[Tensor]:
    """All tensors in the order of the op: the two of the upsampling, then `small`."""
    first = [p.upsample_weight, p.upsample_bias, p.pixel_embedder_weight, p.pixel_embedder_bias]
    blocks = [tensor for block in p.blocks for tensor in block]
    return [*first, p.input_proj_weight, p.input_proj_bias, *blocks, p.output_weight, p.output_bias]


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 8, 12).to(dtype).requires_grad_()


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 6, HIDDEN).to(dtype).requires_grad_()


def loss_arguments(dtype: torch.dtype, with_gradient: bool) -> tuple[Any, ...]:
    weight = torch.tensor([0.5, 2.0])
    return image(dtype), image(), frequency_table(), 0.7, weight, with_gradient


def decoder_arguments(dtype: torch.dtype, keep_y: bool = True) -> tuple[Any, ...]:
    upsample_weight, upsample_bias, *small = flat(parameters())
    return (
        image(),
        tokens(dtype),
        upsample_weight,
        upsample_bias,
        small,
        PATCH,
        "product",
        keep_y,
        True,
    )


def detached(argument: Any) -> Any:
    if isinstance(argument, list):
        return [detached(item) for item in argument]
    return argument.detach() if isinstance(argument, Tensor) else argument


class TestOpcheck:
    """torch's own check of schema, fake, autograd and tracing with fixed and dynamic shapes."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_loss(self, dtype: torch.dtype) -> None:
        torch.library.opcheck(fused_ops.flow_matching_loss, loss_arguments(dtype, True))

    def test_loss_without_gradient(self) -> None:
        arguments = [detached(a) for a in loss_arguments(torch.float32, False)]
        torch.library.opcheck(fused_ops.flow_matching_loss, tuple(arguments))

    def test_loss_backward(self) -> None:
        arguments = torch.tensor(2.0), torch.randn(2, 3, 8, 8), torch.bfloat16
        torch.library.opcheck(fused_ops.flow_matching_loss_backward, arguments)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_decoder(self, dtype: torch.dtype) -> None:
        torch.library.opcheck(fused_ops.pixel_decoder, decoder_arguments(dtype))

    def test_decoder_without_gradient(self) -> None:
        arguments = [detached(a) for a in decoder_arguments(torch.float32, keep_y=False)]
        torch.library.opcheck(fused_ops.pixel_decoder, tuple(arguments))
        _, y, _ = fused_ops.pixel_decoder(*arguments)
        assert y.numel() == 0

    @pytest.mark.parametrize("need_x_grad", [False, True])
    def test_decoder_backward(self, need_x_grad: bool) -> None:
        arguments = [detached(argument) for argument in decoder_arguments(torch.bfloat16)]
        velocity, *kept = fused_ops.pixel_decoder(*arguments)
        x, condition, *parameters, patch_size, position, _, _ = arguments
        torch.library.opcheck(
            fused_ops.pixel_decoder_backward,
            (velocity, x, condition, *kept, *parameters, patch_size, position, need_x_grad),
        )


def decode(p: PixelDecoderParameters) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, condition: ops.pixel_decoder(x, condition, p, PATCH)


def lose(x: Tensor, target: Tensor) -> Tensor:
    return ops.flow_matching_loss(x, target, frequency_table(), 0.7)[0]


class Ignored(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class Counter:
    """A backend of torch.compile that counts the nodes that call each op, and runs the graph."""

    def __init__(self) -> None:
        self.nodes: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            calls = (node.target for node in graph.graph.nodes if node.op == "call_function")
            self.nodes += [str(target) for target in calls if "deco_fast" in str(target)]
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=count)(module, inputs)


class TestCompile:
    def test_the_decoder_is_one_node(self) -> None:
        p, x, condition = parameters(), image(), tokens()
        leaves = [x, condition, *flat(p)]
        expected = torch.autograd.grad(decode(p)(x, condition).square().sum(), leaves)
        counter = Counter()
        velocity = torch.compile(decode(p), backend=counter, fullgraph=True)(x, condition)
        result = torch.autograd.grad(velocity.square().sum(), leaves)
        assert counter.nodes == [
            "deco_fast.pixel_decoder.default",
            "deco_fast.pixel_decoder_backward.default",
        ]
        torch.testing.assert_close(result, expected)

    def test_the_loss_is_one_node(self) -> None:
        x, target = image(), image()
        expected = torch.autograd.grad(lose(x, target), [x, target])
        counter = Counter()
        total = torch.compile(lose, backend=counter, fullgraph=True)(x, target)
        result = torch.autograd.grad(total, [x, target])
        assert counter.nodes[0] == "deco_fast.flow_matching_loss.default"
        assert counter.nodes.count("deco_fast.flow_matching_loss.default") == 1
        torch.testing.assert_close(result, expected)

    @pytest.mark.slow
    def test_inductor(self) -> None:
        p, x, condition = parameters(), image(), tokens()

        def step(x: Tensor, condition: Tensor) -> Tensor:
            return lose(decode(p)(x, 2 * condition) + x, torch.zeros_like(x))

        leaves = [x, condition, *flat(p)]
        expected = torch.autograd.grad(step(x, condition), leaves)
        result = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, condition), leaves)
        torch.testing.assert_close(result, expected)


class Recorder(TorchDispatchMode):
    """Notes the ops that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


class TestDirectLoss:
    """Where nobody looks the loss passes the dispatcher by, and nobody can tell."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_the_op(self, dtype: torch.dtype) -> None:
        # The gradient of a float32 target is not kept in bfloat16: it would be the reference's.
        x, target = image(dtype), image(dtype if dtype == torch.bfloat16 else torch.float32)
        direct = lose(x, target)
        assert "DifferentiableLoss" in direct.grad_fn.name()
        with Recorder() as recorder:
            seen = lose(x, target)
        assert torch.equal(direct, seen)
        result, expected = (torch.autograd.grad(total, [x, target]) for total in (direct, seen))
        assert all(map(torch.equal, result, expected))
        assert "deco_fast.flow_matching_loss.default" in recorder.called

    def test_subclasses_see_the_op(self) -> None:
        with FakeTensorMode() as mode:
            x, table = mode.from_tensor(image()), mode.from_tensor(frequency_table())
        total, *_ = ops.flow_matching_loss(x, x, table, 0.7)  # outside of the mode
        assert isinstance(total, FakeTensor)


class TestAutocast:
    def test_the_decoder_computes_in_the_dtype_of_autocast(self) -> None:
        p, x, condition = parameters(), image(), tokens()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = decode(p)(x, condition)
            with ops.use_backend("reference"):
                expected = decode(p)(x, condition)
        assert velocity.dtype == expected.dtype == torch.bfloat16
        gradients = torch.autograd.grad(velocity.float().square().sum(), [x, condition, *flat(p)])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        # What is kept in bfloat16 is kept: the result differs from float32's, but not by more.
        exact = decode(p)(x, condition)
        error = float(((velocity - exact).norm() / exact.norm()).detach())
        assert 1e-4 < error < 1e-2

    def test_no_copy_of_the_parameters_waits_for_the_backward_pass(self) -> None:
        p, x, condition = parameters(), image(), tokens()
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            decode(p)(x, condition)
        given = {tensor.data_ptr() for tensor in (x, condition, *flat(p))}
        copies = [tensor for tensor in kept if tensor.data_ptr() not in given]
        assert sorted(tensor.numel() for tensor in copies if tensor.numel() > 0) == [
            condition.numel(),
            condition.shape[0] * condition.shape[1] * PATCH**2 * CHANNELS,
        ]

    def test_the_loss_stays_in_float32(self) -> None:
        x, target = image(), image()
        expected = lose(x, target)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(lose(x, target), expected)


class TestAutograd:
    def test_gradcheck_of_directions(self) -> None:
        """The gradient of the whole step against a difference quotient along one direction."""
        p, x, condition = parameters(), image(), tokens()
        target = image().detach()

        def step(x: Tensor, condition: Tensor) -> Tensor:
            return lose(decode(p)(x, condition), target)

        gradients = torch.autograd.grad(step(x, condition), [x, condition])
        directions = [torch.randn_like(tensor) for tensor in (x, condition)]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        h = 1e-2
        with torch.no_grad():
            up = step(x + h * directions[0], condition + h * directions[1])
            down = step(x - h * directions[0], condition - h * directions[1])
        assert slope == pytest.approx(float(up - down) / (2 * h), rel=1e-2)

    def test_only_what_is_asked_for(self) -> None:
        p = parameters()
        x, condition = image().detach(), tokens()
        velocity = decode(p)(x, condition)
        (gradient,) = torch.autograd.grad(velocity.sum(), condition)
        assert gradient.shape == condition.shape
        assert not decode(p)(x, condition.detach()).isnan().any()
        with torch.no_grad():
            assert not decode(p)(x, condition).requires_grad

    def test_accumulation_and_checkpointing(self) -> None:
        p, x, condition, target = parameters(), image(), tokens(), image().detach()

        def step(x: Tensor, condition: Tensor) -> Tensor:
            return lose(decode(p)(x, condition), target)

        for _ in range(2):
            torch.utils.checkpoint.checkpoint(step, x, condition, use_reentrant=False).backward()
        assert condition.grad is not None
        (once,) = torch.autograd.grad(step(x, condition), condition)
        torch.testing.assert_close(condition.grad, 2 * once)

    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_a_kept_graph_gives_the_same_again(self, scale: float) -> None:
        """The loss hands out the gradient that it saved, but only at its last use."""
        x, target = image(), image().detach()
        total = scale * lose(x, target)
        (expected,) = torch.autograd.grad(total, x, retain_graph=True)
        kept = expected.clone()
        total.backward(retain_graph=True)
        assert x.grad is not None
        x.grad.zero_()
        (again,) = torch.autograd.grad(total, x, retain_graph=True)
        (last,) = torch.autograd.grad(total, x)
        assert torch.equal(expected, kept)
        assert torch.equal(again, kept)
        assert torch.equal(last, kept)
        assert not last.requires_grad

    def test_func_grad(self) -> None:
        """By the reference, which alone has the rules for it."""
        p, x, condition = parameters(), image(), tokens()
        expected = torch.autograd.grad(lose(decode(p)(x, condition), x.detach()), condition)[0]
        x, condition = x.detach(), condition.detach()
        result = torch.func.grad(lambda condition: lose(decode(p)(x, condition), x))(condition)
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("op", ["pixel_decoder", "flow_matching_loss"])
    @pytest.mark.parametrize("trained", [False, True])
    def test_forward_mode(self, op: str, trained: bool) -> None:
        """By the reference as well."""
        p, x, condition = parameters(), image(), tokens()
        direction = torch.randn_like(x)

        def function(x: Tensor) -> Tensor:
            return decode(p)(x, condition) if op == "pixel_decoder" else lose(x, target)

        target, step = image().detach(), 1e-3
        start = x if trained else x.detach()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(start, direction)
            tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        assert tangent is not None
        ends = [function(x.detach() + k * step * direction) for k in (1, -1)]
        torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), rtol=0.05, atol=5e-3)

    @pytest.mark.parametrize("op", ["pixel_decoder", "flow_matching_loss", "loss of a graph"])
    def test_a_result_that_nothing_depends_on(self, op: str) -> None:
        x = image()
        if op == "pixel_decoder":
            value = decode(parameters())(x, tokens())
        elif op == "flow_matching_loss":
            value = lose(x, image().detach())
        else:
            value = fused_ops.flow_matching_loss(x, *loss_arguments(x.dtype, True)[1:])[0]
        Ignored.apply(value).sum().backward()
        assert x.grad is None

    @pytest.mark.parametrize("op", ["pixel_decoder", "flow_matching_loss"])
    def test_second_derivatives_are_a_clear_error(self, op: str) -> None:
        x = image()
        if op == "pixel_decoder":
            value = decode(parameters())(x, tokens()).square().sum()
        else:
            value = lose(x, image())
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"deco_fast::{op} cannot .*use_backend"):
            gradient.square().sum().backward()


class Step(torch.nn.Module):
    """The decoder and the loss as one module, for DDP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.nn.ParameterList(flat(parameters()))

    def forward(self, x: Tensor, condition: Tensor, target: Tensor) -> Tensor:
        w = list(self.weights)
        blocks = tuple(BlockParameters(*w[i : i + 8]) for i in range(6, len(w) - 2, 8))
        p = PixelDecoderParameters(*w[:6], blocks, *w[-2:])
        return lose(decode(p)(x, condition), target)


def batch_of_step() -> list[Tensor]:
    torch.manual_seed(1)
    return [image().detach(), tokens().detach(), image().detach()]


def train_half(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch twice, accumulated, and the gradients saved."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    with ops.use_backend("cpp"):
        step = torch.nn.parallel.DistributedDataParallel(Step())
        half = [tensor[rank : rank + 1] for tensor in batch_of_step()]
        with step.no_sync():
            step(*half).backward()
        step(*half).backward()
    gradients = [weight.grad for weight in step.module.weights]
    torch.save(gradients, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ddp_with_accumulation(tmp_path: Path) -> None:
    """Each of two processes ends with the gradients that one has of the whole batch."""
    torch.multiprocessing.spawn(train_half, (str(tmp_path),), nprocs=2)
    step = Step()
    (2 * step(*batch_of_step())).backward()
    expected = [weight.grad for weight in step.weights]
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


class TestFallback:
    def test_other_widths_go_to_the_reference(self) -> None:
        p = parameters()
        x, condition = image(), tokens()
        with pytest.raises(RuntimeError, match="shape"):  # the reference's own, for a wrong layout
            decode(p._replace(output_weight=p.output_weight[:, :8]))(x, condition)
        double = PixelDecoderParameters(
            *(
                tuple(BlockParameters(*(t.double() for t in block)) for block in field)
                if isinstance(field, tuple)
                else field.double()
                for field in p
            )
        )
        velocity = decode(double)(x.double(), condition.double())
        assert velocity.dtype == torch.float64
        torch.testing.assert_close(velocity.float(), decode(p)(x, condition), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["upsample_weight", "upsample_bias"])
    def test_too_few_channels_are_refused(self, name: str) -> None:
        """And not pixels made of whatever was in the memory."""
        p = parameters()
        with pytest.raises(UserError, match=r"must be \(p²·C, D\) and \(p²·C,\) with p = 4"):
            decode(p._replace(**{name: getattr(p, name)[:-1]}))(image(), tokens())


class TestDevices:
    @pytest.mark.parametrize("name", ["upsample_weight", "output_bias", "pixel_embedder_weight"])
    @pytest.mark.parametrize("backend", ["reference", "cpp"])
    def test_a_parameter_on_another_device_is_refused(self, name: str, backend: str) -> None:
        """As on `meta`, where a model stays that was not loaded whole."""
        p = parameters()
        with (
            ops.use_backend(backend),
            pytest.raises(UserError, match=r"on several devices \(cpu, meta\): move them to one"),
        ):
            decode(p._replace(**{name: getattr(p, name).to("meta")}))(image(), tokens())

    def test_a_target_on_another_device_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"flow_matching_loss got tensors on several devices"):
            lose(image(), image().to("meta"))

    def test_a_forced_backend_on_the_wrong_device(self) -> None:
        with pytest.raises(UserError, match="'cpp' computes on cpu, and pixel_decoder got tensors"):
            registry.backend_for("pixel_decoder", "cuda")
        with (
            ops.use_backend("triton"),
            pytest.raises(UserError, match=r"cannot compute|computes on cuda.*on cpu; move them"),
        ):
            lose(image(), image())

    def test_a_wrong_instruction_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DECO_ISA", "sse9")
        with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
            lose(image(), image())
