"""`torchrun train.py` and `deco-train`: train, or go on with, one run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from deco_fast import ops
from deco_fast.checkpoint.lock import alone_in
from deco_fast.cli.installed import command_name, command_words
from deco_fast.cli.parser import CommandParser, not_empty, to_path
from deco_fast.compiling import explain_compile_errors, keep_compiled_code
from deco_fast.config import RunConfig, load_config, option_help
from deco_fast.errors import UserError, nearest, run_command
from deco_fast.kernels.capability import has_fast_bfloat16
from deco_fast.training.distributed import Processes, join_processes, pick_device
from deco_fast.training.estimate import estimate
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.time_limit import parse_duration

if TYPE_CHECKING:
    from deco_fast.training.initial import InitialWeights
    from deco_fast.training.trainer import Trainer


@run_command
def main(argv: list[str] | None = None) -> int:
    """Parse, resolve the configuration, train; the exit status."""
    started = time.monotonic()
    options, overrides = _parser().parse_known_args(argv)
    _check_options(overrides)
    config = load_config(options.config, [*overrides, *_shorthands(options)])
    if config.data.root is not None and config.data.dataset in ("digits", "photographs"):
        raise UserError(
            f"data.root has no effect with data.dataset {config.data.dataset}: add "
            "--data.dataset folder, or leave it out"
        )
    path = options.out or Path("runs") / config.name
    end = None if options.max_time is None else started + parse_duration(options.max_time)
    ops.check_backend("pixel_decoder", "flow_matching_loss")
    if options.dry_run:
        pick_device(options.device)
        return _dry_run(config, path)
    with join_processes(options.device) as processes:
        return _train(config, path, processes, end)


def _train(config: RunConfig, path: Path, processes: Processes, end: float | None) -> int:
    # Imported here, so that --help and --dry-run do not wait for it.
    from deco_fast.sampling.writers import writing
    from deco_fast.training.initial import open_initial_weights
    from deco_fast.training.trainer import Trainer

    def say(line: str) -> None:
        if processes.is_main:
            print(line, flush=True)

    folder = RunFolder(path, config)
    if processes.is_main:
        with writing(path):  # its name may be too long to ask
            folder.check()
    processes.barrier()
    if folder.finished:
        say(f"{path} has finished all {config.training.steps:,} steps")
        say(f"draw from it: {' '.join(command_words('sample'))} --checkpoint {path}")
        return 0
    initial = None
    if config.training.init_from is not None and folder.newest_checkpoint() is None:
        initial = open_initial_weights(config.training.init_from, config.model)
    trainer = Trainer(config, folder, processes, end)
    with alone_in(path) if processes.is_main else nullcontext():
        return _run(trainer, initial, say)


def _run(trainer: Trainer, initial: InitialWeights | None, say: Callable[[str], None]) -> int:
    folder, config, processes = trainer.folder, trainer.config, trainer.processes
    path = folder.path
    # Only now, as it then holds this configuration: what was wrong so far may be corrected.
    adjusted = folder.open() if processes.is_main else []
    processes.barrier()
    passed_over = trainer.resume()
    if passed_over is not None:
        for line in passed_over:
            say(line)
        say(f"resuming {path} at step {trainer.step:,} of {config.training.steps:,}")
        for line in adjusted:
            say(f"from here on {line}")
    else:
        say(f"training {config.name} in {path} for {config.training.steps:,} steps")
        if initial is not None:
            say(initial.load(trainer.training))
    say(
        f"{len(trainer.dataset):,} images, {config.training.batch_size} a step, "
        f"{processes.world_size} × {processes.device}, {config.training.precision}"
    )
    slow_bf16 = processes.device.type == "cpu" and not has_fast_bfloat16()
    if config.training.precision == "bf16" and slow_bf16:
        say("this processor is slower in bf16: --training.precision=fp32 trains faster")
    if trainer.training.features is not None:
        say(trainer.training.features.describe())
    keep_compiled_code()
    with explain_compile_errors("set --training.compile false"):
        interrupt = trainer.run()
    if trainer.step < config.training.steps:
        why = "time limit" if interrupt.signal is None else interrupt.signal.name
        saved = folder.checkpoint(trainer.step)
        say(f"{why}: saved {saved}; the same command goes on from there")
        return interrupt.exit_status
    say(f"finished: {folder.checkpoint(trainer.step)}")
    say(f"draw from it: {' '.join(command_words('sample'))} --checkpoint {path}")
    return 0


def _dry_run(config: RunConfig, path: Path) -> int:
    from deco_fast.training.step import micro_batch_size

    training = config.training
    if training.init_from is not None:
        from deco_fast.training.initial import open_initial_weights

        try:
            open_initial_weights(training.init_from, config.model)
        except UserError as error:
            raise UserError(f"{error}; for an estimate without them --init-from none") from error
    print(config.to_yaml(), end="")
    print(f"\nrun folder          {path}")
    print(estimate(config).describe(micro_batch_size(config)))
    return 0


def _shorthands(options: argparse.Namespace) -> list[str]:
    """The overrides that --repa and --init-from stand for."""
    overrides = []
    if options.init_from is not None:
        overrides.append(f"--training.init_from={options.init_from}")
    if options.repa is not None:
        overrides.append(f"--alignment.enabled={options.repa != 'off'}")
        if options.repa not in ("on", "off"):
            overrides.append(f"--alignment.encoder={options.repa}")
    return overrides


def _check_options(overrides: list[str]) -> None:
    """Refuse what is neither an option nor a key of the configuration, such as --dryrun."""
    options = ["--config", "--out", "--device", "--init-from", "--repa", "--max-time"]
    options += ["--dry-run", "--help"]
    for word in overrides:
        option = word.partition("=")[0]
        if option.startswith("--") and "." not in option and option != "--name":
            raise UserError(f"unknown option '{option}'{nearest(option, options)}")


def _parser() -> CommandParser:
    keys = "\n".join(
        f"  --{key:<32} {description}{f' (default {default})' if default else ''}"
        for key, default, description in option_help()
    )
    parser = CommandParser(
        prog=command_name("train"),
        description="Train a DeCo model; typed again, the same command goes on where it was.",
        epilog="Every key of the configuration is an option as well. The defaults are of keys that "
        f"it\ndoes not have; --dry-run prints what each of them is:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=not_empty,
        default="deco-digits",
        metavar="NAME|FILE",
        help="a name in configs/, or a YAML file (default: deco-digits)",
    )
    parser.add_argument(
        "--out", type=to_path, metavar="FOLDER", help="the run folder (default: runs/NAME)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--repa",
        type=not_empty,
        metavar="on|off|FILE",
        help="align the DiT with DINOv2, whose weights are FILE (default: as configured)",
    )
    parser.add_argument(
        "--init-from",
        type=not_empty,
        metavar="PATH",
        help="begin with the weights of a checkpoint, ours or published, with a fresh optimizer",
    )
    parser.add_argument(
        "--max-time",
        metavar="DURATION",
        help="save and stop, with exit status 0, before so much time has passed, such as 3h30m",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, parameters, FLOPs and memory, and stop",
    )
    return parser
