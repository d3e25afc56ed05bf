"""What is compared: a backend of the ops or a larger part, eager or compiled, in a precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.machine import Machine
from deco_fast import ops

REFERENCE = "reference"


class Precision(NamedTuple):
    """The dtype of weights and inputs, and whether autocast computes in bf16."""

    label: str
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the products run in."""
        return torch.bfloat16 if self.autocast else self.dtype


FLOAT32 = Precision("fp32")
AUTOCAST = Precision("bf16 autocast", autocast=True)
BFLOAT16 = Precision("bf16", torch.bfloat16)

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
"""Of the C++ kernels, each with all that those before it have."""

BACKENDS_ON = {"cpu": (REFERENCE, "cpp"), "cuda": (REFERENCE, "triton")}


@dataclass(frozen=True)
class Variant:
    """One row of a comparison.

    Attributes:
        backend: of the ops.
        compiled: by torch.compile.
        precision: of weights and inputs.
        part: what stands in for the task as the reference does it, where that is more than ops.
        instruction_set: the highest that our C++ kernels may use; torch's libraries are free.
        lean: whether the decoder keeps no block's input for the backward pass (Triton).
        graphed: whether a GPU replays it as a CUDA graph.
    """

    backend: str
    compiled: bool
    precision: Precision
    part: str | None = None
    instruction_set: str | None = None
    lean: bool = False
    graphed: bool = False

    @property
    def name(self) -> str:
        """For people: backend or part, way of running, precision."""
        way = "torch.compile" if self.compiled else "eager"
        way += " and CUDA graph" if self.graphed else ""
        limit = f" limited to {self.instruction_set}" if self.instruction_set else ""
        lean = " lean" if self.lean else ""
        return f"{self.part or self.backend}{lean}{limit}, {way}, {self.precision.label}"

    @property
    def is_baseline(self) -> bool:
        """Whether ours must beat it."""
        return self.backend == REFERENCE and self.part is None

    def compile(
        self, function: Callable[..., Any], options: dict[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The function, compiled if this variant is; with Inductor's options if it is ours.

        For static shapes, as they are the same at every call: the strongest form of the baseline.
        """
        if not self.compiled:
            return function
        options = None if self.is_baseline else options
        return torch.compile(function, fullgraph=True, dynamic=False, options=options)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """The backend and the instruction set, for the time of a call."""
        with ops.use_backend(self.backend), ops.keep_block_inputs(not self.lean):
            if self.instruction_set is None:
                yield
                return
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DECO_ISA", self.instruction_set)
                yield

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context that the forward runs in."""
        if self.precision.autocast:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()


def fastest_backend(machine: Machine, op: str) -> str:
    """The fused backend of the device, or the reference where that is absent."""
    fused = BACKENDS_ON[machine.device.type][1]
    return REFERENCE if ops.backends()[op][fused] else fused


def variants(
    machine: Machine, op_names: Sequence[str], precisions: Sequence[Precision], compile_fused: bool
) -> dict[Variant, str | None]:
    """All rows of a comparison, with the reason where one cannot be timed here.

    Args:
        machine: the device, and whether it can compile.
        op_names: the ops that the task calls; a backend must have all of them.
        precisions: of the comparison.
        compile_fused: whether torch.compile has anything to do around a fused op.
    """
    table = ops.backends()
    rows: dict[Variant, str | None] = {}
    for precision in precisions:
        for backend in BACKENDS_ON[machine.device.type]:
            missing = next(
                (f"{op}: {reason}" for op in op_names if (reason := table[op][backend])), None
            )
            rows[Variant(backend, False, precision)] = missing
            if backend == REFERENCE or compile_fused:
                rows[Variant(backend, True, precision)] = missing or machine.no_compiler
    return rows


def lean_variants(
    machine: Machine, op: str, precisions: Sequence[Precision]
) -> dict[Variant, str | None]:
    """The Triton backend as it keeps the least for the backward pass."""
    if machine.device.type != "cuda" or ops.backends()[op]["triton"] is not None:
        return {}
    return {Variant("triton", False, precision, lean=True): None for precision in precisions}


def limited_variants(
    machine: Machine, op: str, precisions: Sequence[Precision], instruction_set: str
) -> dict[Variant, str | None]:
    """The C++ backend as it runs on a lesser processor, where more is used here."""
    if machine.device.type != "cpu" or ops.backends()[op]["cpp"] is not None:
        return {}
    from deco_fast import _C

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECO_ISA", "")
        used = _C.instruction_set()
    if INSTRUCTION_SETS.index(instruction_set) >= INSTRUCTION_SETS.index(used):
        return {}
    return {
        Variant("cpp", False, precision, instruction_set=instruction_set): None
        for precision in precisions
    }
