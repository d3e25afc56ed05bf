"""The golden tensors on CUDA: the network and the loss, with plain operations and the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from golden import gradient_norms, load_model, relative_error, tensors

from deco_fast import flow_matching_loss, frequency_table, ops

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-5
"""Relative, in float32, as on the CPU."""

P16, P8 = "model_c2i_deco_p16", "model_c2i_deco_p8"
T16, T8 = "model_t2i_deco_p16", "model_t2i_deco_p8"


@pytest.fixture(autouse=True, params=["reference", "triton"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with ops.use_backend(request.param):
        yield


@pytest.mark.parametrize(
    ("name", "case", "compiled"),
    [
        (P16, "sq", False),
        (P16, "wide", False),
        (P16, "tall", False),
        (P8, "sq", False),
        (P8, "wide", False),
        (P8, "wide", True),
        (T16, "sq", False),
        (T16, "tall", False),
        (T8, "wide", False),
        ("model_c2i_pixnerd_p16", "wide", False),
        ("model_c2i_baseline_p16", "wide", False),
    ],
)
def test_velocity_and_gradients_equal_golden(name: str, case: str, compiled: bool) -> None:
    golden, model = tensors(name), load_model(name).cuda()
    network = torch.compile(model, fullgraph=True) if compiled else model
    x, t, y, g = (golden[f"{case}.in.{key}"].cuda() for key in "xtyg")
    x.requires_grad_()
    velocity = network(x, t, y)
    (velocity * g).sum().backward()
    assert x.grad is not None
    assert relative_error(velocity.cpu(), golden[f"{case}.out.v"]) <= TOLERANCE
    assert relative_error(x.grad.cpu(), golden[f"{case}.grad.x"]) <= TOLERANCE
    expected = golden[f"{case}.grad.norms"]
    assert ((gradient_norms(model, name).cpu() - expected).abs() / expected).max() <= TOLERANCE


@pytest.mark.parametrize("shape", ["2x3x32x32", "1x3x40x24", "1x3x30x20"])
def test_loss_and_gradients_equal_golden(shape: str) -> None:
    golden = tensors("loss_freq")
    prediction = golden[f"{shape}.out"].cuda().requires_grad_()
    target, table = golden[f"{shape}.v_t"].cuda(), frequency_table().cuda()
    total, matching, frequency = flow_matching_loss(prediction, target, table, 1.0)
    (gradient,) = torch.autograd.grad(total, prediction)
    name = f"{shape}.q85.inv_gamma.g1.0"
    assert relative_error(matching.cpu(), golden[f"{shape}.fm_loss"]) <= 1e-6
    assert relative_error(frequency.cpu(), golden[f"{name}.fm_loss_freq"]) <= 1e-6
    expected = golden[f"{shape}.grad_fm"] + golden[f"{name}.grad_freq"]
    assert relative_error(gradient.cpu(), expected) <= TOLERANCE
