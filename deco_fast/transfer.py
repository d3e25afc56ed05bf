"""Between the CPU and where a model is, without waiting for what else that has to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a device, in its shape and dtype; on a GPU the copy is ordered and not waited for.

    From memory that is not pinned it would wait for all that the GPU still has to do.
    """
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def begin_to_cpu(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Begin to copy tensors of one device to the CPU.

    Returns:
        A function that gives the copies: it waits for them, and for nothing that a GPU was ordered
        to do after this call.
    """
    if not tensors[0].is_cuda:
        copies = tuple(tensor.cpu() for tensor in tensors)
        return lambda: copies
    copies = tuple(
        torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    )
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> tuple[Tensor, ...]:
        there.synchronize()
        return copies

    return wait
