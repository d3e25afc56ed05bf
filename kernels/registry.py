"""Which backend computes an op: the one table of implementations, and the rule that picks.

An op is a folder beside this file. Its implementation for a backend is a function of the op's
name in a module of that folder, and one entry of `_SOURCES` registers it. All backends of an op
take the same arguments, those of `deco_fast.ops`.

By default a tensor on the CPU goes to `cpp` and one on CUDA to `triton`, where these are there, and
everything else to `reference`. The environment variable `DECO_BACKEND` or `use_backend` force one
backend for all ops; what it lacks is then an error and never a silent fallback.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch

from deco_fast.errors import UserError
from deco_fast.kernels.registration import INTERPRETED
from deco_fast.kernels.sources import fingerprint

OPS: Final = (
    "linear_upsample",
    "pixel_decoder",
    "flow_matching_loss",
    "qk_norm_rope",
    "norm_modulate",
    "swiglu",
)
BACKENDS: Final = ("reference", "triton", "cpp")

_SOURCES: Final[dict[tuple[str, str], str]] = {
    ("linear_upsample", "reference"): "deco_fast.kernels.linear_upsample.reference",
    ("pixel_decoder", "reference"): "deco_fast.kernels.pixel_decoder.reference",
    ("flow_matching_loss", "reference"): "deco_fast.kernels.flow_matching_loss.reference",
    # By itself a product and nothing else, and so the libraries' affair.
    ("linear_upsample", "triton"): "deco_fast.kernels.linear_upsample.reference",
    ("linear_upsample", "cpp"): "deco_fast.kernels.linear_upsample.reference",
    ("pixel_decoder", "triton"): "deco_fast.kernels.pixel_decoder.fused",
    ("pixel_decoder", "cpp"): "deco_fast.kernels.pixel_decoder.fused",
    ("flow_matching_loss", "triton"): "deco_fast.kernels.flow_matching_loss.fused",
    ("flow_matching_loss", "cpp"): "deco_fast.kernels.flow_matching_loss.fused",
    # Of the DiT: a CPU gains nothing from these.
    ("qk_norm_rope", "reference"): "deco_fast.kernels.qk_norm_rope.reference",
    ("qk_norm_rope", "triton"): "deco_fast.kernels.qk_norm_rope.fused",
    ("qk_norm_rope", "cpp"): "deco_fast.kernels.qk_norm_rope.reference",
    ("norm_modulate", "reference"): "deco_fast.kernels.norm_modulate.reference",
    ("norm_modulate", "triton"): "deco_fast.kernels.norm_modulate.fused",
    ("norm_modulate", "cpp"): "deco_fast.kernels.norm_modulate.reference",
    ("swiglu", "reference"): "deco_fast.kernels.swiglu.reference",
    ("swiglu", "triton"): "deco_fast.kernels.swiglu.joined",
    ("swiglu", "cpp"): "deco_fast.kernels.swiglu.reference",
}

_PREFERRED: Final = {"cpu": "cpp", "cuda": "triton"}


_BUILD: Final = "pip install --no-build-isolation -e ."
# There in a checkout; a link where an editable install made a tree of links.
_SOURCE_FOLDER: Final = Path(__file__).resolve().parents[1] / "csrc"


def _devices(backend: str) -> tuple[str, ...]:
    """Where a backend computes; empty for everywhere."""
    if backend == "triton":
        return ("cuda", "cpu") if INTERPRETED else ("cuda",)
    return ("cpu",) if backend == "cpp" else ()


def triton_problem() -> str | None:
    """Why Triton cannot be used here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it exists for Linux on x86-64: pip install triton"
    return None


def extension_problem() -> str | None:
    """Why the C++ extension cannot be used here, or None."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1 gives the CPU to the interpreted Triton kernels; unset it"
    try:
        importlib.import_module("deco_fast._C")
    except ImportError as error:
        return (
            f"deco_fast._C cannot be imported ({error}); with a C++ compiler, pybind11 and ninja: "
            f"{_BUILD}"
        )
    return stale_extension()


def _extension_is_there() -> bool:
    """Whether there is an extension that somebody built to use it, and no Triton in its place."""
    return not INTERPRETED and importlib.util.find_spec("deco_fast._C") is not None


def stale_extension() -> str | None:
    """That the C++ extension was built from other sources than those beside it, or None.

    Its functions may then take other arguments, or compute something else.
    """
    from deco_fast import _C

    sources = fingerprint(_SOURCE_FOLDER)
    if sources is None or sources == getattr(_C, "sources", None):
        return None
    return f"deco_fast._C was built from other sources than {_SOURCE_FOLDER} holds: {_BUILD}"


def _load() -> tuple[dict[str, dict[str, Callable[..., Any]]], dict[str, dict[str, str]]]:
    implementations: dict[str, dict[str, Callable[..., Any]]] = {op: {} for op in OPS}
    absent: dict[str, dict[str, str]] = {op: {} for op in OPS}
    problems = {"reference": None, "triton": triton_problem(), "cpp": extension_problem()}
    if problems["cpp"] is not None and _extension_is_there():
        warnings.warn(f"{problems['cpp']}; until then the reference computes", stacklevel=2)
    for backend, problem in problems.items():
        for op in OPS:
            source = _SOURCES.get((op, backend))
            if source is None:
                absent[op][backend] = "not implemented in this version"
            elif problem is not None:
                absent[op][backend] = problem
            else:
                implementations[op][backend] = getattr(importlib.import_module(source), op)
    return implementations, absent


# Plain globals: torch.compile reads them while it traces, guards on them, and so compiles anew
# when the forced backend changes. It cannot trace a context variable.
_implementations, _absent = _load()
_forced: str | None = os.environ.get("DECO_BACKEND") or None


_forced_outside = _forced
_blocks: dict[int, str] = {}
"""The backend of each `with use_backend(…)` that is being executed, by its number."""
_lock = threading.Lock()


def _changing() -> AbstractContextManager[object]:
    # The compiler cannot trace a lock, and traces in one thread.
    return nullcontext() if torch.compiler.is_compiling() else _lock


def _check_name(backend: str, origin: str) -> None:
    if backend not in BACKENDS:
        raise UserError(f"{origin}: unknown backend '{backend}'; choose {', '.join(BACKENDS)}")


def check_backend(*ops: str) -> None:
    """Raise UserError if the forced backend does not exist or cannot compute one of these ops, or
    if DECO_ISA names no instruction set of this processor.

    A command does so before it begins, because under `torch.compile` the error comes late and
    wrapped.
    """
    if extension_problem() is None:
        instruction_set()
    _check_forced(*ops)


def _check_forced(*ops: str) -> None:
    if _forced is None:
        return
    _check_name(_forced, "DECO_BACKEND")
    for op in ops:
        if _forced not in _implementations[op]:
            raise UserError(
                f"backend '{_forced}' cannot compute {op}: {_absent[op][_forced]}; force "
                "'reference', or unset DECO_BACKEND and let the device decide"
            )


def instruction_set() -> str:
    """What the C++ kernels use: the fastest here, or what DECO_ISA names.

    Raises:
        UserError: DECO_ISA names one that is not here.
    """
    from deco_fast import _C

    try:
        return _C.instruction_set()
    except ValueError as error:
        raise UserError(str(error)) from error


def is_forced() -> bool:
    """Whether one backend is forced for all ops."""
    return _forced is not None


def is_allowed(backend: str) -> bool:
    """Whether no other backend is forced."""
    return _forced in (None, backend)


def backend_for(op: str, device_type: str) -> str:
    """The name of the backend that computes `op` for tensors on `device_type`.

    Raises:
        UserError: as `check_backend`, and if the forced backend does not run on this device.
    """
    if _forced is not None:
        _check_forced(op)
        devices = _devices(_forced)
        if devices and device_type not in devices:
            raise UserError(
                f"backend '{_forced}' computes on {' and '.join(devices)}, and {op} got tensors on "
                f"{device_type}; move them, or unset DECO_BACKEND and let the device decide"
            )
        return _forced
    preferred = _PREFERRED.get(device_type, "reference")
    return preferred if preferred in _implementations[op] else "reference"


def implementation(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that computes `op` for arguments that lie where `tensor` lies."""
    return _implementations[op][backend_for(op, tensor.device.type)]


def backends() -> dict[str, dict[str, str | None]]:
    """For every op and backend None where it is available, else the reason why it is not."""
    return {op: {name: _absent[op].get(name) for name in BACKENDS} for op in OPS}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute every op inside the `with` block with one backend, in all threads.

    Of several blocks at once the one that was entered last decides, whichever thread entered it.

    Args:
        name: `"reference"`, `"triton"` or `"cpp"`.

    Raises:
        UserError: if there is no such backend; inside the block, when an op is called that the
            backend cannot compute.
    """
    global _forced, _forced_outside
    _check_name(name, "use_backend")
    with _changing():
        if not _blocks:
            _forced_outside = _forced
        number = max(_blocks, default=0) + 1
        _blocks[number] = _forced = name
    try:
        yield
    finally:
        with _changing():
            # Not always the last one: another thread may have entered one since.
            del _blocks[number]
            _forced = _blocks[max(_blocks)] if _blocks else _forced_outside
