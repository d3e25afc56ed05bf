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


def loss_curve(backend: str, device: str) -> torch.Tensor:
    """The loss of every step of the digits preset's first 300."""
    config = load_config("deco-digits")
    processes = Processes(0, 1, torch.device(device))
    training = TrainingStep(config, processes)
    batches = Batches(open_dataset(config), config, processes, start_step=0)
    losses = []
    with ops.use_backend(backend):
        for step in range(STEPS):
            losses.append(training(step, next(batches)).by_name["loss/total"])
    return torch.stack(losses).cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "device"),
    [("cpp", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)],
)
def test_a_fused_backend_follows_the_loss_curve_of_the_reference(backend: str, device: str) -> None:
    reason = ops.backends()["pixel_decoder"][backend]
    if reason is not None:
        pytest.skip(reason)
    reference = loss_curve("reference", device)
    fused = loss_curve(backend, device)
    difference = ((fused - reference) / reference).abs()
    assert difference[:25].max() < 1e-4, f"step {int(difference[:25].argmax())}"
    assert reference[-100:].mean() < 0.2 * reference[0]
    assert abs(fused[-100:].mean() / reference[-100:].mean() - 1) < 0.15
