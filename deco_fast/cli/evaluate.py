"""`python evaluate.py KIND` and `deco-evaluate KIND`: measure models and the images they draw."""

from __future__ import annotations

from deco_fast.cli import evaluate_ablate, evaluate_digits, evaluate_metrics, evaluate_spectrum
from deco_fast.cli.installed import command_name
from deco_fast.cli.parser import CommandParser
from deco_fast.errors import run_command


@run_command
def main(argv: list[str] | None = None) -> int:
    """Parse and run one kind of evaluation; the exit status."""
    parser = CommandParser(
        prog=command_name("evaluate"), description="Measure models and the images they draw."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for command in (evaluate_metrics, evaluate_spectrum, evaluate_ablate, evaluate_digits):
        command.add_parser(kinds)
    options = parser.parse_args(argv)
    return int(options.run(options))
