"""The command `python -m deco_fast.interop`."""

from __future__ import annotations

import argparse
import sys

from deco_fast.checkpoint.format import WEIGHTS
from deco_fast.cli.parser import CommandParser, not_empty
from deco_fast.errors import run_command
from deco_fast.interop.convert import convert
from deco_fast.interop.model_folder import export
from deco_fast.models.presets import PRESETS


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m deco_fast.interop",
        description="Exchange checkpoints with the original, and publish them.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "convert",
        help="a published checkpoint to ours, or ours to the published layout",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "source",
        type=not_empty,
        metavar="IN",
        help="a checkpoint or run folder, a .safetensors, a .ckpt, or hf:owner/repository/file",
    )
    command.add_argument(
        "destination",
        type=not_empty,
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
    command = commands.add_parser(
        "export",
        help="a folder to publish: config.json, safetensors and a model card",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("source", type=not_empty, metavar="CHECKPOINT", help="as IN of convert")
    command.add_argument("destination", type=not_empty, metavar="FOLDER", help="a new folder")
    command.add_argument("--weights", choices=WEIGHTS, default="ema", help="the network")
    command.add_argument("--preset", metavar="NAME", help="as of convert")
    command.add_argument("--force", action="store_true", help="replace FOLDER if it exists")
    return parser


@run_command
def main(argv: list[str] | None = None) -> int:
    """Parse, convert or export, say what was not carried; the exit status."""
    arguments = _parser().parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("weights", "preset", "force")}
    if arguments.command == "export":
        notes = export(arguments.source, arguments.destination, **options)
    else:
        notes = convert(arguments.source, arguments.destination, progress=True, **options)
    print(f"wrote {arguments.destination}")
    for note in notes:
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
