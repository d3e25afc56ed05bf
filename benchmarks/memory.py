"""Memory: what an op keeps for its backward, and what a call needs at its peak."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def saved_for_backward(function: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps alive between the forward and the backward of ``function``.

    Storages count once, however many views of them are saved. Those of ``held`` (weights, inputs)
    do not count: they would stay without a backward too.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(sizes.values())


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at its peak on top of what was there before it.

    On a GPU what torch's allocator handed out, on Linux the resident memory of the process;
    None where neither is to be had.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Freed memory that the C library still holds would hide what the call takes of it.
        ctypes.CDLL(None).malloc_trim(0)
        # "5" resets the high-water mark (man 5 proc); it would be the whole process's otherwise.
        _CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
        function()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError, TypeError):
        return None


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def available_memory(device: torch.device) -> int:
    """Bytes that a new tensor could take, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return total_memory()


def total_memory() -> int:
    """Bytes of main memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
