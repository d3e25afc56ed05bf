"""The command `python -m deco_fast.data.shards`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deco_fast.cli.installed import command_words
from deco_fast.cli.parser import CommandParser, not_empty, whole_number
from deco_fast.data.shards.pack import CLASSES, pack
from deco_fast.errors import run_command


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m deco_fast.data.shards", description="Image sets as shards (tar files)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "pack",
        help="write class folders as shards; typed again, it goes on where it was",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "folder", type=not_empty, metavar="FOLDER", help="holds a folder of images per class"
    )
    command.add_argument("out", type=not_empty, metavar="OUT", help="the folder for the shards")
    command.add_argument(
        "--images-per-shard", type=whole_number(1), default=10_000, metavar="N", help="at most"
    )
    command.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="of the shuffling"
    )
    return parser


@run_command
def main(argv: list[str] | None = None) -> int:
    """Parse, pack, say what is there now; the exit status."""
    options = _parser().parse_args(argv)
    shards = pack(options.folder, options.out, options.images_per_shard, options.seed)
    print(f"{options.out} holds {len(shards):,} shard(s)")
    classes = len(json.loads(Path(options.out, CLASSES).read_text(encoding="utf-8")))
    keys = f"--data.dataset shards --data.root {options.out} --model.num_classes {classes}"
    print(f"train on them: {' '.join(command_words('train'))} {keys}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
