"""Where the time of a training step goes: the GPU's work, the host's, and what is waited for.

    python -m benchmarks.profile_step FIGURES.json

Each way of making the step is a line: the time of a step, how long the host takes to order one
(with all of the GPU's work left to be done), and how long the GPU works at it. A step that takes
as long as the host is bound by it. The batch lies on the device, so that loading is no part of
it. Beside the figures lie, for each way, its kernels as a table and as a Chrome trace.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.encoder import random_features
from benchmarks.inputs import normal, randomize
from benchmarks.markdown import markdown_table
from deco_fast import ops
from deco_fast.cli.parser import CommandParser, one_of, whole_number
from deco_fast.config import RunConfig, load_config
from deco_fast.data.loader import Batch
from deco_fast.errors import UserError, run_command
from deco_fast.sampling.writers import check_writable
from deco_fast.training.captured import can_capture
from deco_fast.training.distributed import Processes, pick_device
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
    "reference": Way("reference", ("--training.cuda_graph=false",)),
    "graph": Way(None, ("--training.cuda_graph=true",)),
    "fused": Way(None, ("--training.cuda_graph=false",)),
}


@dataclass(frozen=True)
class StepTimes:
    """Of one step, in seconds.

    Attributes:
        step: of a row of steps, for which the host may order ahead as it does in training; mean.
        host: until the last order is given, beginning with an idle GPU; median.
        gpu: the sum of the kernels' times.
        launches: kernels and copies on the GPU.
    """

    step: float
    host: float
    gpu: float
    launches: float


@run_command
def main(argv: list[str] | None = None) -> None:
    """Profile every way that was asked for, one after the other; print and write a table.

    Raises:
        UserError: a configuration is wrong, a way cannot be gone here, or the folder not written.
    """
    parser = CommandParser(
        prog="python -m benchmarks.profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", type=Path, metavar="FIGURES.json")
    parser.add_argument("--config", default="c2i_l_256", metavar="NAME|FILE")
    parser.add_argument("--batch", type=whole_number(1), default=32)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--steps", type=whole_number(1), default=20, help="(default: %(default)s)")
    parser.add_argument("--ways", nargs="+", type=one_of(tuple(WAYS)), help="(default: all)")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    folder = options.figures.parent
    check_writable(folder, "FIGURES.json:")
    configs = {}
    for name in options.ways or WAYS:
        words = [f"--training.batch_size={options.batch}", *WAYS[name].options]
        config = load_config(options.config, [*words, *(f"--{word}" for word in options.set)])
        captured = config.training.cuda_graph
        if captured and not can_capture(config.training, Processes(0, 1, device)):
            if options.ways:
                raise UserError(f"--ways {name}: a CUDA graph needs a GPU, leave it out here")
            continue
        configs[name] = config
    folder.mkdir(parents=True, exist_ok=True)
    times: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        backend = WAYS[name].backend
        with ops.use_backend(backend) if backend else nullcontext():
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
        features = random_features(device, config.training.precision)
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
    started = time.perf_counter()
    for _ in range(count):
        function()
    wait()
    step = (time.perf_counter() - started) / count
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
    # The optimizer's annotation spans kernels that are events of their own.
    kernels = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    gpu = sum(event.self_device_time_total for event in kernels) * 1e-6
    return StepTimes(
        step,
        statistics.median(hosts),
        gpu / PROFILED_STEPS,
        len(kernels) / PROFILED_STEPS,
    )


if __name__ == "__main__":
    sys.exit(main())
