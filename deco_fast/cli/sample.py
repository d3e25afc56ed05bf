"""`python sample.py` and `deco-sample`: draw images with a checkpoint."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deco_fast import __version__, ops
from deco_fast.checkpoint import load_checkpoint, read_card, read_config
from deco_fast.checkpoint.find import locate
from deco_fast.cli.sample_options import DTYPES, sample_parser
from deco_fast.compiling import explain_compile_errors, keep_compiled_code
from deco_fast.errors import UserError, run_command
from deco_fast.guidance import check_interval
from deco_fast.models.attention import activate_flash_attention
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import DeCoConfig
from deco_fast.models.deco import DeCo
from deco_fast.models.fp8 import fp8_problem
from deco_fast.models.presets import preset
from deco_fast.sampling.batch_size import default_batch_size, largest_batch_size
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import save_grid
from deco_fast.sampling.recipes import recipe_settings, resolve_settings
from deco_fast.sampling.run import (
    draw,
    labels_for,
    share,
    weights_checksum,
)
from deco_fast.sampling.source import checkpoint_name, default_checkpoint
from deco_fast.sampling.writers import (
    GRID_FILE,
    NpzFile,
    PngFolder,
    check_writable,
    free_folder,
)
from deco_fast.training.distributed import Processes, join_processes, pick_device

GRID_IMAGES = 100
"""The grid shows the first so many images."""


@run_command
def main(argv: list[str] | None = None) -> int:
    """Parse, resolve, draw; the exit status."""
    options = sample_parser().parse_args(argv)
    ops.check_backend("pixel_decoder")
    plan = _plan(options)
    with join_processes(options.device) as processes:
        return _run(plan, options, processes)


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before the weights are read.

    Attributes:
        checkpoint: the folder or file.
        reason: why this one, where none was named.
        card: what the checkpoint, or the preset, says about sampling.
        height, width: of an image in pixels.
        settings: solver, steps, guidance.
        labels: the class of each image.
    """

    checkpoint: Path
    reason: str
    card: ModelCard
    height: int
    width: int
    settings: SamplingSettings
    labels: list[int]


def _plan(options: argparse.Namespace) -> _Plan:
    """Resolve the options against the checkpoint's header.

    Raises:
        UserError: they cannot be carried out.
    """
    device = pick_device(options.device)
    if options.dtype == "fp8" and (problem := fp8_problem(device)):
        raise UserError(f"--dtype fp8: {problem}")
    if options.guidance_interval:
        _check_interval(options.guidance_interval)
    if options.out:
        check_writable(options.out, "--out")
    if options.npz:
        if options.npz.is_dir():
            raise UserError(f"--npz {options.npz} is a folder: name a file in it")
        check_writable(options.npz.parent, "--npz")
    named, reason = (
        (options.checkpoint, "") if options.checkpoint else default_checkpoint(options.runs)
    )
    checkpoint = locate(named)
    config = read_config(checkpoint)
    if not isinstance(config, DeCoConfig):
        raise UserError(f"{checkpoint} draws from text: use deco_fast.sample")
    card = preset(options.preset).card if options.preset else read_card(checkpoint)
    height, width = options.height or card.height, options.width or card.width
    _check_size(config, height, width)
    recipe = recipe_settings(options.recipe, height, width) if options.recipe else None
    settings = resolve_settings(card.sampling, recipe, _given_settings(options))
    return _Plan(
        checkpoint=checkpoint,
        reason=reason,
        card=card,
        height=height,
        width=width,
        settings=settings,
        labels=labels_for(options.num, config.num_classes, options.classes),
    )


def _given_settings(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in asdict(SamplingSettings())}
    if options.guidance_interval:
        given["guidance_interval"] = tuple(options.guidance_interval)
    return given


def _check_interval(interval: list[float]) -> None:
    try:
        check_interval((interval[0], interval[1]))
    except ValueError as error:
        raise UserError(f"--guidance-interval: {error}") from error


def _check_size(config: DeCoConfig, height: int, width: int) -> None:
    patch = config.patch_size
    for option, size in (("--height", height), ("--width", width)):
        if size % patch:
            nearest_size = max(1, round(size / patch)) * patch
            raise UserError(
                f"{option} {size} is not divisible by the patch size {patch}: use {nearest_size}"
            )
    if config.in_channels != 3:
        raise UserError(
            f"the checkpoint draws images of {config.in_channels} channels, and image files here "
            "have 3: use deco_fast.sample"
        )


def _run(plan: _Plan, options: argparse.Namespace, processes: Processes) -> int:
    def say(title: str, text: str) -> None:
        if processes.is_main:
            print(f"{title:<11} {text}", flush=True)

    torch.set_float32_matmul_precision(options.matmul_precision)
    activate_flash_attention(processes.device)
    model = load_checkpoint(
        plan.checkpoint,
        options.weights,
        processes.device,
        DTYPES[options.dtype],
        options.preset,
    )
    assert isinstance(model, DeCo)
    engine_of = functools.partial(
        SamplingEngine,
        model,
        plan.settings,
        height=plan.height,
        width=plan.width,
        fp8=options.dtype == "fp8",
    )
    num = len(plan.labels)
    own_share = -(-num // processes.world_size)
    batch_size = min(options.batch_size or _batch_size(plan, engine_of, processes), own_share)
    reason = f" ({plan.reason})" if plan.reason else ""
    say("checkpoint", f"{plan.checkpoint}, {options.weights} weights{reason}")
    for assumption in plan.card.assumed:
        say("assumed", assumption)
    say("images", f"{num:,} of {plan.height}×{plan.width}, seed {options.seed}")
    say("sampling", _describe(plan.settings))
    say(
        "computing",
        f"{options.dtype} on {processes.world_size} × {processes.device}, batch {batch_size}",
    )

    output = _open_output(plan, options, processes, _record(plan, options, model))
    if isinstance(output, NpzFile) and output.finished:
        say("finished", f"{output.path} holds these images already; --overwrite draws them again")
        return 0
    own = share(num, batch_size, processes.rank, processes.world_size)
    pending = output.pending(own)
    if len(pending) < len(own):
        say("resuming", f"{len(own) - len(pending):,} of {len(own):,} images are in {output.path}")
    if pending:
        engine = engine_of(batch_size=batch_size, compile=options.compile)
        if options.compile:
            say("compiling", "for the batch size, once with and once without guidance")
            keep_compiled_code()
            with explain_compile_errors("leave --compile out"):
                engine.warm_up()
    processes.barrier()

    started = time.perf_counter()
    if pending:
        labels = [plan.labels[index] for index in pending]
        batches = draw(engine, labels, pending, seed=options.seed, progress=processes.is_main)
        for indices, images in batches:
            output.write(indices, images)
    seconds = time.perf_counter() - started
    processes.barrier()
    if not processes.is_main:
        return 0

    grid = _grid_path(options, output)
    save_grid(output.first(min(num, GRID_IMAGES)), grid)
    output.finish(progress=True)
    if pending:
        rounds = -(-len(pending) // batch_size)
        per_image = seconds / (len(pending) * processes.world_size)
        per_step = seconds / (rounds * plan.settings.steps)
        say("time", f"{_seconds(per_image)} per image, {_seconds(per_step)} per step of a batch")
    say("grid", str(grid))
    say("npz file" if options.npz else "images", str(output.path))
    return 0


def _batch_size(plan: _Plan, engine_of: Callable[..., SamplingEngine], processes: Processes) -> int:
    """On a GPU the largest batch that fits, the same for all processes."""
    if processes.device.type != "cuda":
        return default_batch_size(processes.device, plan.height, plan.width)

    def run(size: int) -> None:
        engine_of(batch_size=size).try_out()

    own_share = -(-len(plan.labels) // processes.world_size)
    fitting = largest_batch_size(run, plan.height, plan.width, own_share)
    return processes.least(fitting)


def _record(plan: _Plan, options: argparse.Namespace, model: DeCo) -> dict[str, Any]:
    """What the images are drawn with, to be kept beside them."""
    return {
        "checkpoint": str(plan.checkpoint),
        "weights": options.weights,
        "weights_checksum": weights_checksum(model),
        "num": len(plan.labels),
        "classes": options.classes,
        "height": plan.height,
        "width": plan.width,
        "seed": options.seed,
        "dtype": options.dtype,
        "matmul_precision": options.matmul_precision,
        "device": options.device,
        "deco_fast": __version__,
        **asdict(plan.settings),
    }


def _open_output(
    plan: _Plan, options: argparse.Namespace, processes: Processes, record: dict[str, Any]
) -> PngFolder | NpzFile:
    """The first process makes the place for the images, then the others find it."""

    def choose() -> PngFolder | NpzFile:
        if options.npz:
            return NpzFile(options.npz, record, plan.labels)
        if options.out:
            return PngFolder(options.out, record, plan.labels)
        solver, steps = plan.settings.solver, plan.settings.steps
        name = f"{checkpoint_name(plan.checkpoint)}-{solver}{steps}-seed{options.seed}"
        base = Path("samples") / name
        if options.overwrite:
            return PngFolder(base, record, plan.labels)
        return free_folder(base, record, plan.labels)

    if processes.is_main:
        output = choose()
        output.open(options.overwrite)
    processes.barrier()
    return output if processes.is_main else choose()


def _grid_path(options: argparse.Namespace, output: PngFolder | NpzFile) -> Path:
    if isinstance(output, PngFolder):
        return output.path / GRID_FILE
    if options.out:
        return options.out / GRID_FILE
    return output.path.with_name(f"{output.path.stem}-{GRID_FILE}")


def _describe(settings: SamplingSettings) -> str:
    order = f" of order {settings.order}" if settings.solver == "adams" else ""
    parts = [f"{settings.solver}{order}", f"{settings.steps} steps"]
    if settings.guidance_scale == 1:
        parts.append("no guidance")
    else:
        low, high = settings.guidance_interval
        end = ")" if settings.solver == "adams" else "]"
        parts.append(f"guidance {settings.guidance_scale:g} in ({low:g}, {high:g}{end}")
        if settings.guidance_rescale:
            parts.append(f"rescaled by {settings.guidance_rescale:g}")
    parts.append(f"time shift {settings.time_shift:g}")
    return ", ".join(parts)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
