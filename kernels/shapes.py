"""What the Triton kernels read is checked first: they go by pointers, and a wrong shape would be
memory that is not ours. The C++ kernels do the same in csrc/tensors.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def expect(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    """Raise ValueError, with the tensor's name, if it has another shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(tensor.shape)}")
