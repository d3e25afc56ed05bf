"""How a Triton kernel is compiled: stated once, launched by the host, checked ahead of time.

Every `gpu.py` has a function `specialisations(capability)` that yields what its host functions
launch on a GPU of that compute capability (80, 86, 90, 100): the same kernel, constants, warps and
stages, taken from the same tables. `tests/kernels/test_ahead_of_time.py` compiles all of them
without a GPU and holds them to their stated limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specialisation:
    """One compilation of one kernel.

    Raises:
        ValueError: an argument of the kernel is neither typed nor a constant, or there is no such
            argument.
    """

    name: str
    """Unique, for messages: `pixel_decoder_forward bfloat16 C=32 blocks=3`."""
    kernel: Any
    """The function under `triton.jit`."""
    types: dict[str, str]
    """Triton's type of each argument that is no constant: `*bf16`, `i32`, `i64`, `fp32`."""
    constants: dict[str, Any]
    """The `tl.constexpr` arguments, and pointers that are None."""
    num_warps: int = 4
    num_stages: int = 1
    programs: int = 1
    """Launched for each multiprocessor, to be on it at the same time."""
    divisible_by_16: frozenset[str] | None = None
    """Arguments that the launch finds divisible by 16; None for all pointers."""
    stack_bytes: int = 0
    """Stack per thread that is accepted: 0 allows no spilled register."""
    tensor_cores: bool = False
    """The machine code must have tensor-core instructions."""

    def __post_init__(self) -> None:
        stated = self.types.keys() | self.constants.keys()
        if stated != set(self.kernel.arg_names):
            odd = sorted(stated ^ set(self.kernel.arg_names))
            raise ValueError(f"{self.name}: arguments {', '.join(odd)} are missing or unknown")
