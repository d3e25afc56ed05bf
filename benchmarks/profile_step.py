"""Where the time of a training step goes: the GPU's work, the host's, and what is waited for.

    python -m benchmarks.profile_step FIGURES.json

Each way of making the step is a line: the time of a step, how long the host takes to order one
(with all of the GPU's work left to be done), and how long the GPU works at it. A step that takes
as long as the host is bound by it. The batch lies on the device, so that loading is no part of
it. Beside the figures lie, for each way, its kernels as a table and as a Chrome trace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.inputs import normal, randomize
from benchmarks.markdown import markdown_table
from deco_fast import ops
from deco_fast.alignment.dinov2 import DINOv2, random_dinov2
from deco_fast.alignment.features import Features
from deco_fast.config import RunConfig, load_config
from deco_fast.data.loader import Batch
from deco_fast.training.distributed import Processes
from deco_fast.training.step import TrainingStep

WARM_UP = 5
PROFILED_STEPS = 3
TABLE_ROWS = 60


@dataclass(frozen=True)
class Way:
    """A way to make the step.

    Attributes:
        backend: of the ops; None is the default.
        options: of the configuration.
    """

    backend: str | None
    options: tuple[str, ...] = ()


WAYS = {
    "reference": Way("reference"),
    "fused": Way(None),
    "graph": Way(None, ("--training.cuda_graph=true",)),
}


@dataclass(frozen=True)
class StepTimes:
    """Of one step, in seconds.

    Attributes:
        step: from one step's end to the next one's, in a row of steps; median.
        host: until the last order is given, beginning with an idle GPU; median.
        gpu: the sum of the kernels' times.
        launches: kernels and copies on the GPU.
    """

    step: float
    host: float
    gpu: float
    launches: float


def main(argv: list[str] | None = None) -> None:
    """Profile every way that was asked for, one after the other; print and write a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", type=Path)
    parser.add_argument("--config", default="c2i_l_256")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    folder = options.figures.parent
    times: dict[str, dict[str, float]] = {}
    for name in options.ways:
        way = WAYS[name]
        words = [f"--training.batch_size={options.batch}", *way.options]
        config = load_config(options.config, [*words, *(f"--{word}" for word in options.set)])
        with ops.use_backend(way.backend) if way.backend else nullcontext():
            step = _training_step(config, device)
            times[name] = asdict(_profile(step, options.steps, device, folder / name))
        del step  # before the next one is made
        torch.compiler.reset()
        options.figures.write_text(json.dumps({"profile": times}) + "\n", encoding="utf-8")
    print(describe_profile(times))


def describe_profile(times: Mapping[str, Mapping[str, float]]) -> str:
    """`StepTimes` of each way as a Markdown table, in milliseconds."""
    return markdown_table(
        [
            {
                "step": name,
                "ms": f"{of['step'] * 1e3:,.4g}",
                "of the host": f"{of['host'] * 1e3:,.4g}",
                "of the GPU": f"{of['gpu'] * 1e3:,.4g}",
                "launches": f"{of['launches']:,.0f}",
            }
            for name, of in times.items()
        ]
    )


def _training_step(config: RunConfig, device: torch.device) -> Callable[[], object]:
    """A step as `train.py` makes it, on a batch that is there."""
    features = None
    if config.alignment.enabled:
        features = Features(DINOv2(random_dinov2()).to(device))
    step = TrainingStep(config, Processes(0, 1, device), features)
    randomize(step.model)
    step.prepare()
    batch_size, data = config.training.batch_size, config.data
    indices = torch.arange(batch_size)
    images = normal(batch_size, 3, data.height, data.width).clamp(-1, 1).to(device)
    batch = Batch(images, indices.to(device) % 10, indices)
    return lambda: step(0, batch)


def _profile(
    function: Callable[[], object], count: int, device: torch.device, out: Path
) -> StepTimes:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(WARM_UP):
        function()
    wait()
    hosts = []
    for _ in range(count):
        started = time.perf_counter()
        function()
        hosts.append(time.perf_counter() - started)
        wait()
    ends = []
    for _ in range(count + 1):
        function()
        # The host may be a step ahead, as it is when it trains.
        ends.append(_end(device))
    wait()
    steps = [_between(*pair) for pair in itertools.pairwise(ends)]
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            function()
        wait()
    averages = profiler.key_averages()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = averages.table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=90)
    out.with_suffix(".txt").write_text(table, encoding="utf-8")
    profiler.export_chrome_trace(f"{out}.json.gz")
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    gpu = sum(event.self_device_time_total for event in kernels) * 1e-6
    return StepTimes(
        statistics.median(steps),
        statistics.median(hosts),
        gpu / PROFILED_STEPS,
        len(kernels) / PROFILED_STEPS,
    )


def _end(device: torch.device) -> torch.cuda.Event | float:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float) and isinstance(second, float)
        return second - first
    milliseconds: float = first.elapsed_time(second)
    return milliseconds * 1e-3


if __name__ == "__main__":
    main()
