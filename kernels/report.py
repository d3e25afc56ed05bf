"""`python -m deco_fast.ops`: the backends of this machine, and what they depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

import torch

import deco_fast
from deco_fast.cli.parser import CommandParser
from deco_fast.errors import UserError, run_command
from deco_fast.kernels.registry import (
    BACKENDS,
    OPS,
    backend_for,
    backends,
    check_backend,
    extension_problem,
    instruction_set,
    triton_problem,
)


def _columns(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _is_used(op: str, backend: str, device_type: str) -> bool:
    try:
        return backend_for(op, device_type) == backend
    except UserError:  # the forced backend lacks this op or device
        return False


def _used_on(op: str, backend: str) -> str:
    devices = [device for device in ("cpu", "cuda") if _is_used(op, backend, device)]
    return f", used on {' and '.join(devices)}" if devices else ""


def _status_rows() -> Iterable[tuple[str, ...]]:
    status = backends()
    yield "op", "backend", "status"
    for op in OPS:
        for backend in BACKENDS:
            yield op, backend, status[op][backend] or f"available{_used_on(op, backend)}"


def _cuda_devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)


def _machine_rows() -> Iterable[tuple[str, ...]]:
    yield "deco_fast", deco_fast.__version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "triton", triton_problem() or importlib.metadata.version("triton")
    yield "C++ extension", extension_problem() or "built"
    if extension_problem() is None:
        yield "CPU instruction set", instruction_set()
    yield "OpenMP threads", str(torch.get_num_threads())
    yield "CUDA devices", _cuda_devices()


@run_command
def main(argv: list[str] | None = None) -> int:
    """Print a table of every op and backend, and one of versions and hardware.

    Raises:
        UserError: DECO_BACKEND or DECO_ISA name something that is not here.
    """
    CommandParser(
        prog="python -m deco_fast.ops",
        description="Print every op with its backends, and this machine's versions and hardware.",
    ).parse_args(argv)
    print(_columns(_status_rows()), _columns(_machine_rows()), sep="\n\n", flush=True)
    check_backend(*OPS)
    return 0
