"""Copies between the CPU and a device."""

from __future__ import annotations

import pytest
import torch

from deco_fast.transfer import begin_to_cpu, to_device


def check(device: torch.device) -> None:
    numbers, flags = torch.randn(3, 5), torch.tensor([True, False])
    x, y = to_device(numbers, device), to_device(flags, device)
    wait = begin_to_cpu(x, y)
    copied = wait()
    assert all(tensor.device.type == "cpu" for tensor in copied)
    assert torch.equal(copied[0], numbers) and torch.equal(copied[1], flags)


def test_on_a_cpu() -> None:
    check(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    check(torch.device("cuda"))
    # What is ordered later neither reaches the copy nor is waited for.
    x = torch.ones(1000, device="cuda")
    wait = begin_to_cpu(x)
    torch.cuda._sleep(10**9)
    x.zero_()
    done = torch.cuda.current_stream().record_event()
    (copied,) = wait()
    assert not done.query()
    assert copied.min() == 1
