"""The machine under the benchmarks: what it is, and the fastest it was seen to go today."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
import subprocess
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F

from benchmarks.memory import total_memory
from benchmarks.timing import Clock
from benchmarks.work import Work

# A peak is the best of many tries: a machine that does something else as well is rarely at it.
PROBE_SECONDS, PROBE_TRIES = 0.5, 5
VERSIONS_OF = ("torch", "triton", "numpy", "pytest-benchmark", "deco-fast")


class Floor(NamedTuple):
    """The time under which nobody gets on this machine, and what sets it."""

    seconds: float
    bound: str


class Machine:
    """A device with its peaks, each measured once a session, when first asked for.

    Args:
        device: "cpu" or a CUDA device.
        quick: probe with small sizes, for a trial of the suite itself.
    """

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device = device
        self.clock = Clock(device)
        self._gemm_rates: dict[torch.dtype, float] = {}
        self._quick = quick
        on_gpu = device.type == "cuda"
        self._gemm_sizes = (256,) if quick else (4096, 8192) if on_gpu else (512, 1024, 2048)
        self._copy_bytes = 2 ** (22 if quick else 30 if on_gpu else 28)

    @cached_property
    def name(self) -> str:
        """The device's name as its maker writes it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        name: str = cpuinfo.get_cpu_info().get("brand_raw") or platform.processor()
        return name

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest square product in ``dtype``, the library's best.

        A peak of libraries, not of the silicon: an own kernel may come out above it.
        """
        if dtype not in self._gemm_rates:
            best = 0.0
            for size in self._gemm_sizes:
                # Where bf16 is emulated a large product would take minutes.
                if best and 2 * size**3 / best > 1:
                    break
                best = max(best, self._probe_gemm(size, dtype))
            self._gemm_rates[dtype] = best
        return self._gemm_rates[dtype]

    def _probe_gemm(self, size: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        seconds = self._fastest(lambda: F.linear(a, b))
        # torch hands fp32 products to MKL, which on AMD has no AVX-512, as oneDNN has.
        # The operator is torch's own and private: only the other figure is sure to exist.
        onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if self.device.type == "cpu" and onednn is not None:
            with contextlib.suppress(RuntimeError):
                seconds = min(seconds, self._fastest(lambda: onednn(a, b, None, "none", [], None)))
        return 2 * size**3 / seconds

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes/s of a copy larger than the caches, read and written bytes together."""
        source = torch.ones(self._copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self._fastest(lambda: target.copy_(source))

    def _fastest(self, function: Callable[[], object]) -> float:
        self.clock(function)
        tries: list[float] = []
        while len(tries) < PROBE_TRIES or (sum(tries) < PROBE_SECONDS and not self._quick):
            tries.append(self.clock(function))
        return min(tries)

    def floor(self, work: Work, dtype: torch.dtype) -> Floor:
        """The longer of computing at the rate of a product and moving at that of a copy."""
        compute = work.flops / self.gemm_rate(dtype)
        memory = work.bytes / self.copy_bandwidth
        return Floor(compute, "compute") if compute >= memory else Floor(memory, "memory")

    @cached_property
    def no_bf16(self) -> str | None:
        """Why bf16 is not worth timing here, or None.

        A processor without bf16 instructions emulates them, tens of times slower than float32,
        which is nobody's choice and would take the suite's whole time.
        """
        if self.device.type != "cpu":
            return None
        rate, float32_rate = self.gemm_rate(torch.bfloat16), self.gemm_rate(torch.float32)
        if rate >= float32_rate / 4:
            return None
        return f"no fast bf16 here: its products run at {rate / float32_rate:.0%} of float32's rate"

    @cached_property
    def no_compiler(self) -> str | None:
        """Why torch.compile cannot be used here, or None."""
        if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            return "torch.compile is turned off by TORCH_COMPILE_DISABLE"
        # A size nobody had before: a kernel out of the cache would need no compiler.
        trial = torch.zeros(random.SystemRandom().randrange(2, 10**6), device=self.device)
        try:
            torch.compile(lambda x: x.sin() + 1, fullgraph=True, dynamic=False)(trial)
        except Exception as error:  # whatever a broken toolchain throws is the reason
            return "torch.compile fails: " + str(error).strip().splitlines()[0]
        return None

    def to_json(self) -> dict[str, Any]:
        """What a record says of the machine; rates that were not needed are left out."""
        versions = {"python": platform.python_version()}
        for package in VERSIONS_OF:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "device": self.name,
            "device_type": self.device.type,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": total_memory(),
            "system": platform.platform(terse=True),
            "versions": versions,
            "gemm_flops_per_second": {
                str(dtype).removeprefix("torch."): rate for dtype, rate in self._gemm_rates.items()
            },
            "copy_bytes_per_second": self.copy_bandwidth,
        }


def commit() -> str:
    """The checkout's commit, "-dirty" where files differ from it.

    Outside of git what DECO_COMMIT says, for a copy that was sent to a machine with a GPU.
    """
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DECO_COMMIT", "unknown")
    return described.stdout.strip()
