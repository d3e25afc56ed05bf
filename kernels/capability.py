"""What a device can do, as far as the choice of an implementation depends on it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def has_avx512() -> bool:
    """Whether torch and its libraries use AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def is_foreign(tensor: Tensor) -> bool:
    """Whether it lies on a GPU that the Triton kernels are not made for.

    They are made for NVIDIA's from Ampere (sm_80) on, and have instructions of its assembly.
    """
    if not tensor.is_cuda:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(tensor.device) < (8, 0)


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether a CPU's products in bfloat16 are faster than in float32; True where no one can tell.

    The C++ extension tells (csrc/instruction_set.h).
    """
    from deco_fast.kernels.registry import extension_problem

    if extension_problem() is not None:
        return True
    from deco_fast import _C

    return _C.has_fast_bfloat16()
