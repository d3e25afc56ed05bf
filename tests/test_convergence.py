"""Trained from one seed, a model does not care which backend computed its steps.

Training is chaotic: to perturb the initial weights by 1e-7, a rounding error, moves the loss of
single steps by 19% within the digits preset's first 300, as much as a change of backend does, and
at no useful learning rate do all of them stay within 1%. So the steps are compared until the
rounding has grown, and after that the average.
"""

from __future__ import annotations

import pytest
import torch

from deco_fast import ops
from deco_fast.config import load_config
from deco_fast.training.batches import Batches, open_dataset
from deco_fast.training.distributed import Processes
from deco_fast.training.step import TrainingStep

STEPS = 300
STEPS_BEFORE_ROUNDING_GROWS = 25


def loss_curve(backend: str, device: str, steps: int) -> torch.Tensor:
    """The loss of each of the digits preset's first steps."""
    config = load_config("deco-digits")
    processes = Processes(0, 1, torch.device(device))
    training = TrainingStep(config, processes)
    batches = Batches(open_dataset(config), config, processes, start_step=0)
    losses = []
    with ops.use_backend(backend):
        for step in range(steps):
            losses.append(training(step, next(batches)).by_name["loss/total"])
    return torch.stack(losses).cpu()


def loss_curves(backend: str, device: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By the reference, and by a fused backend."""
    reason = ops.backends()["pixel_decoder"][backend]
    if reason is not None:
        pytest.skip(reason)
    return loss_curve("reference", device, steps), loss_curve(backend, device, steps)


ON_A_GPU = pytest.param("triton", "cuda", marks=pytest.mark.gpu)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), [("cpp", "cpu"), ON_A_GPU])
def test_a_fused_backend_follows_the_reference_step_by_step(backend: str, device: str) -> None:
    reference, fused = loss_curves(backend, device, STEPS_BEFORE_ROUNDING_GROWS)
    difference = ((fused - reference) / reference).abs()
    assert difference.max() < 1e-4, f"step {int(difference.argmax())}"


@pytest.mark.parametrize(
    ("backend", "device"), [pytest.param("cpp", "cpu", marks=pytest.mark.soak), ON_A_GPU]
)
def test_a_fused_backend_learns_what_the_reference_learns(backend: str, device: str) -> None:
    reference, fused = loss_curves(backend, device, STEPS)
    assert reference[-100:].mean() < 0.2 * reference[0]
    assert abs(fused[-100:].mean() / reference[-100:].mean() - 1) < 0.15
