"""Compile Triton kernels for GPUs that are not here, and read what the assembler made of them.

    python tests/kernels/ahead_of_time.py flow_matching_loss 80 90

prints for every kernel of the op, and every compute capability, its registers, stack, shared and
tensor memory. Nothing is run, so nothing here is a time.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deco_fast.kernels.specialisation import Specialisation

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one block can have (CUDA C++ Programming Guide); 89 is as 86."""

TENSOR_MEMORY_COLUMNS = 512
"""Of a multiprocessor of sm_100."""

# HMMA is the instruction of sm_80, which sm_90 and sm_100 still have beside their own.
_TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What one thread (registers, stack) and one block (the rest) of a kernel need."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    instructions: int
    tensor_core_instructions: int


@functools.cache
def _disassembler(name: str) -> str:
    """The path of a tool that Triton ships."""
    path: str = getattr(triton.knobs.nvidia, name).path
    return path


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [_disassembler(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def compile_for(specialisation: Specialisation, capability: int) -> Compiled:
    """Compile as a launch on a GPU of that capability would, and disassemble the result."""
    s = specialisation
    names = s.kernel.arg_names
    divisible = s.divisible_by_16
    if divisible is None:
        divisible = frozenset(name for name, kind in s.types.items() if kind.startswith("*"))
    source = ASTSource(
        s.kernel,
        # In the order of the arguments: Triton numbers the compiled function's by it.
        {name: s.types.get(name, "constexpr") for name in names},
        constexprs=s.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)},
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": s.num_warps, "num_stages": s.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage = _RESOURCES.search(_run("cuobjdump", "-res-usage", str(cubin)))
        assembly = _run("nvdisasm", "-c", str(cubin))
    assert usage is not None, f"{s.name}: cuobjdump gives no resource usage"
    registers, stack, _, local = map(int, usage.groups())
    instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s", assembly, re.MULTILINE)
    return Compiled(
        registers=registers,
        stack_bytes=stack + local,
        shared_bytes=binary.metadata.shared,
        # Triton knows of none where the chip has none.
        tensor_memory_columns=getattr(binary.metadata, "tmem_size", None) or 0,
        instructions=len(instructions),
        tensor_core_instructions=len(_TENSOR_CORES.findall(assembly)),
    )


def specialisations(op: str, capability: int) -> list[Specialisation]:
    """All that the op's `gpu.py` launches on such a GPU."""
    return list(importlib.import_module(f"deco_fast.kernels.{op}.gpu").specialisations(capability))


def main(op: str, *capabilities: str) -> None:
    """Print a table of an op's kernels."""
    print("sm  registers  stack  shared  columns  instructions  tensor  kernel")
    for capability in map(int, capabilities or SHARED_MEMORY_LIMIT):
        for s in specialisations(op, capability):
            c = compile_for(s, capability)
            print(
                f"{capability:<4}{c.registers:9}{c.stack_bytes:7}{c.shared_bytes:8}"
                f"{c.tensor_memory_columns:9}{c.instructions:14}{c.tensor_core_instructions:8}"
                f"  {s.name}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
