"""`python sample.py` and `deco-sample`: draw images with a checkpoint."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deco_fast import __version__, ops
from deco_fast.checkpoint import load_checkpoint, read_card, read_config
from deco_fast.checkpoint.checksums import weights_checksum
from deco_fast.checkpoint.find import locate
from deco_fast.checkpoint.lock import alone_in
from deco_fast.cli.sample_options import DTYPES, sample_parser
from deco_fast.compiling import explain_compile_errors, keep_compiled_code
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.errors import UserError, run_command
from deco_fast.guidance import check_interval
from deco_fast.kernels.capability import has_fast_bfloat16
from deco_fast.models.attention import activate_flash_attention
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import DeCoT2IConfig
from deco_fast.models.fp8 import fp8_problem
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.presets import preset
from deco_fast.sampling.batch_size import default_batch_size, largest_batch_size
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import save_grid
from deco_fast.sampling.job import Job, Output, check_size, make_job
from deco_fast.sampling.prompts import shorten
from deco_fast.sampling.recipes import recipe_settings, resolve_settings
from deco_fast.sampling.run import (
    draw,
    share,
)
from deco_fast.sampling.source import checkpoint_name, default_checkpoint
from deco_fast.sampling.text_encoder import cut_prompts, open_text_encoder, text_encoder_path
from deco_fast.sampling.writers import (
    GRID_FILE,
    GRID_FOLDER_KEY,
    VERSION_KEY,
    NpzFile,
    PngFolder,
    check_writable,
    writing,
)
from deco_fast.solvers import time_grid
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
        job: the class or prompt of each image.
    """

    checkpoint: Path
    reason: str
    card: ModelCard
    height: int
    width: int
    settings: SamplingSettings
    job: Job


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
        if options.out.name in ("", ".."):  # names are made of it
            options.out = options.out.resolve()
        if not options.out.name:
            raise UserError(f"--out {options.out}: name a folder in it")
        check_writable(options.out, "--out")
    if options.npz:
        with writing(options.npz):  # its name may be too long to ask
            is_folder = options.npz.is_dir()
        if is_folder:
            raise UserError(f"--npz {options.npz} is a folder: name a file in it")
        check_writable(options.npz.parent, "--npz")
    named, reason = (
        (options.checkpoint, "") if options.checkpoint else default_checkpoint(options.runs)
    )
    checkpoint = locate(named)
    config = read_config(checkpoint)
    job = make_job(config, vars(options))
    card = preset(options.preset).card if options.preset else read_card(checkpoint)
    height, width = options.height or card.height, options.width or card.width
    check_size(config, height, width, square=options.dpg is not None)
    if options.recipe and isinstance(config, DeCoT2IConfig):
        raise UserError(
            "--recipe: the recipes are those of class models; give --solver and --steps"
        )
    recipe = recipe_settings(options.recipe, height, width) if options.recipe else None
    settings = resolve_settings(card.sampling, recipe, _given_settings(options))
    time_grid(settings.steps, settings.time_shift)
    return _Plan(
        checkpoint=checkpoint,
        reason=reason,
        card=card,
        height=height,
        width=width,
        settings=settings,
        job=job,
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
    encoder_path = text_encoder_path(options.text_encoder, plan.card)
    encoder = open_text_encoder(model, encoder_path, processes.device)
    engine_of = functools.partial(
        SamplingEngine,
        model,
        plan.settings,
        encode_text=encoder,
        distinct_conditions=plan.job.distinct,
        height=plan.height,
        width=plan.width,
        fp8=options.dtype == "fp8",
    )
    num = len(plan.job.labels)
    own_share = -(-num // processes.world_size)
    batch_size = min(options.batch_size or _batch_size(plan, engine_of, processes), own_share)
    reason = f" ({plan.reason})" if plan.reason else ""
    say("checkpoint", f"{plan.checkpoint}, {options.weights} weights{reason}")
    for assumption in plan.card.assumed:
        say("assumed", assumption)
    say("images", f"{num:,} of {plan.height}×{plan.width}, seed {options.seed}")
    if encoder is not None:
        for line in _describe_prompts(plan.job, options, encoder):
            say("prompts", line)
    say("sampling", _describe(plan.settings))
    say(
        "computing",
        f"{options.dtype} on {processes.world_size} × {processes.device}, batch {batch_size}",
    )
    if options.dtype == "bf16" and processes.device.type == "cpu" and not has_fast_bfloat16():
        say("", "this processor is slower in bf16: --dtype fp32 draws faster")

    # The first process makes the place for the images, alone in it, then the others find it.
    record = _record(plan, options, model, encoder)
    output = _choose_output(plan, options, record) if processes.is_main else None
    if output is not None:
        _check_grid(options, output)
    with alone_in(_place(output)) if output is not None else nullcontext():
        if output is not None:
            output.open(options.overwrite)
        processes.barrier()
        if output is None:
            output = _choose_output(plan, options, record)
        if output.finished:
            say(
                "finished",
                f"{output.path} holds these images already; --overwrite draws them again",
            )
            return 0
        return _fill(output, plan, options, processes, engine_of, batch_size, say)


def _fill(
    output: Output,
    plan: _Plan,
    options: argparse.Namespace,
    processes: Processes,
    engine_of: Callable[..., SamplingEngine],
    batch_size: int,
    say: Callable[[str, str], None],
) -> int:
    """Draw what the output does not hold yet."""
    num = len(plan.job.labels)
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
        every = plan.job.conditions
        batches = draw(
            engine,
            [every[index] for index in pending],
            pending,
            seed=options.seed,
            uncondition=None if plan.job.prompts is None else options.negative_prompt,
            progress=processes.is_main,
        )
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

    own_share = -(-len(plan.job.labels) // processes.world_size)
    fitting = largest_batch_size(run, plan.height, plan.width, own_share)
    return processes.least(fitting)


def _record(
    plan: _Plan,
    options: argparse.Namespace,
    model: DeCoNetwork,
    encoder: Qwen3TextEncoder | None,
) -> dict[str, Any]:
    """What the images are drawn with, to be kept beside them."""
    return {
        "checkpoint": str(plan.checkpoint),
        "weights": options.weights,
        "weights_checksum": weights_checksum(model),
        "num": len(plan.job.labels),
        **_recorded_conditions(plan, options, encoder),
        "height": plan.height,
        "width": plan.width,
        "seed": options.seed,
        "dtype": options.dtype,
        "matmul_precision": options.matmul_precision,
        "device": options.device,
        VERSION_KEY: __version__,
        **asdict(plan.settings),
    }


def _choose_output(plan: _Plan, options: argparse.Namespace, record: dict[str, Any]) -> Output:
    solver, steps = plan.settings.solver, plan.settings.steps
    parts = [checkpoint_name(plan.checkpoint), f"{solver}{steps}", f"seed{options.seed}"]
    parts += [plan.job.benchmark] if plan.job.benchmark else []
    if options.npz:
        record = record | {GRID_FOLDER_KEY: _grid_folder(options)}
    return plan.job.output(
        options.out or Path("samples") / "-".join(parts),
        record,
        is_free=options.out is None and not options.overwrite,
        npz=options.npz,
    )


def _place(output: Output) -> Path:
    """The folder that is written to: an npz file is made of the batches in one beside it."""
    return output.partial if isinstance(output, NpzFile) else output.path


def _check_grid(options: argparse.Namespace, output: Output) -> None:
    """Raise UserError where a grid would take the place of what is not one of these images."""
    if isinstance(output, PngFolder) or options.overwrite:
        return
    if isinstance(output, NpzFile):
        option, before = "--npz", output.settings_before
        folder = _grid_folder(options)
        is_begun = before is not None and before.get(GRID_FOLDER_KEY, folder) == folder
    else:
        option, is_begun = "--out", output.settings_file.exists()
    grid = _grid_path(options, output)
    option = "--out" if options.out else option
    if grid.exists() and not is_begun:
        raise UserError(
            f"{grid} exists, where the grid of {output.path} goes: choose another {option}, or "
            "--overwrite it"
        )


def _grid_folder(options: argparse.Namespace) -> str | None:
    """Of the grid of an npz file; None for the file's own."""
    return str(options.out.absolute()) if options.out else None


def _grid_path(options: argparse.Namespace, output: Output) -> Path:
    if isinstance(output, PngFolder):
        return output.path / GRID_FILE
    if isinstance(output, NpzFile) and options.out:
        return options.out / GRID_FILE
    # A folder's name has no suffix, whatever dots there are in it.
    name = output.path.stem if isinstance(output, NpzFile) else output.path.name
    return output.path.with_name(f"{name}-{GRID_FILE}")


def _describe_prompts(
    job: Job, options: argparse.Namespace, encoder: Qwen3TextEncoder
) -> list[str]:
    """How many there are, and which are cut."""
    assert job.prompts is not None
    count = f"{len(job.prompts)}" if len(job.prompts) > 1 else repr(shorten(job.prompts[0]))
    negative = repr(shorten(options.negative_prompt)) if options.negative_prompt else "nothing"
    lines = [f"{count}, away from {negative}, encoded by {encoder.path}"]
    if encoder.note:
        lines.append(encoder.note)
    return lines + cut_prompts(encoder, [*job.prompts, options.negative_prompt])


def _recorded_conditions(
    plan: _Plan, options: argparse.Namespace, encoder: Qwen3TextEncoder | None
) -> dict[str, Any]:
    if encoder is None:
        return {"classes": options.classes}
    return {
        "prompts": plan.job.prompts,
        "negative_prompt": options.negative_prompt,
        "text_encoder": encoder.path,
        "text_encoder_checksum": encoder.fingerprint,
    }


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
