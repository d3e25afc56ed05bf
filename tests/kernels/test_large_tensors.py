"""The C++ kernels on tensors of more than 2³¹ elements, checked on slices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.inputs import randomize
from benchmarks.memory import available_memory
from deco_fast import ops
from deco_fast.kernels import registry
from deco_fast.losses import frequency_table
from deco_fast.models.config import DeCoConfig
from deco_fast.models.decoder import PixelDecoder

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        registry.extension_problem() is not None,
        reason=f"the C++ backend is not available: {registry.extension_problem()}",
    ),
]


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    torch.manual_seed(0)
    with ops.use_backend("cpp"):
        yield


def require_memory(gib: int) -> None:
    if available_memory(torch.device("cpu")) < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free memory")


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def test_loss_of_one_image() -> None:
    require_memory(11)
    height, width = 26768, 26760
    shift = 1000  # the target is the prediction, shifted in the same storage
    storage = torch.empty(3 * height * width + shift, dtype=torch.bfloat16).normal_()
    prediction = storage[:-shift].view(1, 3, height, width)
    target = storage[shift:].view(1, 3, height, width)
    assert prediction.numel() > 2**31
    prediction.requires_grad_()
    total, *terms = ops.flow_matching_loss(prediction, target, frequency_table(), 0.7)
    (gradient,) = torch.autograd.grad(total, prediction)

    # Strips of whole blocks: their losses average to the whole one's, their gradients are larger
    # by their number.
    strips, rows = 14, height // 14
    assert rows % 8 == 0
    parts = torch.zeros(3, dtype=torch.float64)
    for strip in range(strips):
        place = slice(strip * rows, (strip + 1) * rows)
        x = prediction.detach()[:, :, place].contiguous().requires_grad_()
        losses = ops.flow_matching_loss(x, target[:, :, place], frequency_table(), 0.7)
        parts += torch.stack(losses).detach().double() / strips
        if strip in (0, strips - 1):
            # The last blocks once more by the reference, which would take all memory for more.
            with ops.use_backend("reference"):
                corner = x.detach()[:, :, -16:].float().requires_grad_()
                target_corner = target[:, :, place][:, :, -16:].float()
                loss, *_ = ops.flow_matching_loss(corner, target_corner, frequency_table(), 0.7)
                (expected,) = torch.autograd.grad(loss, corner)
            scale = corner.numel() / prediction.numel()
            result = gradient[:, :, place][:, :, -16:]
            assert relative_error(result, scale * expected) < 5e-3
    for value, expected_value in zip((total.detach(), *terms), parts, strict=True):
        assert float(value) == pytest.approx(float(expected_value), rel=1e-5)


def test_decoder_with_a_large_condition() -> None:
    """Each pixel has 64 channels: the upsampled tokens are what is large."""
    require_memory(14)
    config = DeCoConfig(
        hidden_size=16, depth=1, num_heads=2, patch_size=16, decoder_hidden_size=64, decoder_depth=1
    )
    batch, side = 129, 512
    assert batch * side**2 * config.decoder_hidden_size > 2**31
    decoder = PixelDecoder(config)
    randomize(decoder)
    x = torch.empty(batch, 3, side, side, dtype=torch.bfloat16).normal_().requires_grad_()
    length = (side // config.patch_size) ** 2
    tokens = torch.empty(batch, length, 16, dtype=torch.bfloat16).normal_().requires_grad_()
    upstream = torch.empty_like(x).normal_()

    def run(images: slice) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        x_part, tokens_part = x[images].detach(), tokens[images].detach()
        leaves = [x_part.requires_grad_(), tokens_part.requires_grad_()]
        velocity = decoder(*leaves)
        leaves += decoder.parameters()
        grad_x, grad_tokens, *rest = torch.autograd.grad(velocity, leaves, upstream[images])
        return velocity.detach(), grad_x, grad_tokens, rest

    velocity, grad_x, grad_tokens, weight_gradients = run(slice(None))
    sums = [torch.zeros_like(gradient, dtype=torch.float64) for gradient in weight_gradients]
    for first in range(0, batch, 43):
        images = slice(first, first + 43)
        *results, gradients = run(images)
        whole = (velocity[images], grad_x[images], grad_tokens[images])
        for result, expected in zip(whole, results, strict=True):
            assert relative_error(result, expected) < 1e-2
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    for gradient, expected in zip(weight_gradients, sums, strict=True):
        assert relative_error(gradient, expected) < 1e-2
    # The last image, whose condition lies beyond 2³¹ elements at every pixel's end.
    last = slice(batch - 1, batch)
    with ops.use_backend("reference"):
        decoder.double()
        expected = decoder(x[last].double(), tokens[last].double())
    assert relative_error(velocity[last], expected.detach()) < 1e-2
