"""The command `python -m deco_fast.interop`."""

from __future__ import annotations

import argparse
import sys

from deco_fast.checkpoint.format import WEIGHTS
from deco_fast.errors import run_command
from deco_fast.interop.convert import convert
from deco_fast.models.presets import PRESETS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deco_fast.interop", description="Exchange checkpoints with the original."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "convert",
        help="a published checkpoint to ours, or ours to the published layout",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "source",
        metavar="IN",
        help="a checkpoint or run folder, a .safetensors, a .ckpt, or hf:owner/repository/file",
    )
    command.add_argument(
        "destination",
        metavar="OUT",
        help="NAME.ckpt: published layout; NAME.safetensors: one network; else a folder of ours",
    )
    command.add_argument(
        "--weights", choices=WEIGHTS, default="ema", help="the network for a .safetensors"
    )
    command.add_argument(
        "--preset",
        metavar="NAME",
        help=f"image size and sampling settings of one of: {', '.join(PRESETS)}",
    )
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


@run_command
def main(argv: list[str] | None = None) -> int:
    """Parse, convert, say what was not carried; the exit status."""
    arguments = _parser().parse_args(argv)
    notes = convert(
        arguments.source,
        arguments.destination,
        weights=arguments.weights,
        preset=arguments.preset,
        force=arguments.force,
        progress=True,
    )
    print(f"wrote {arguments.destination}")
    for note in notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
