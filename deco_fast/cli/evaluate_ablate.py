"""`python evaluate.py ablate`: train and evaluate a list of configurations on equal terms."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deco_fast import ops
from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.cli.parser import not_empty, to_path, whole_number
from deco_fast.errors import UserError
from deco_fast.experiments.folder import FIGURE_FILES, MARKDOWN_FILE, SuiteFolder
from deco_fast.experiments.suite import (
    Evaluation,
    PlannedRun,
    Suite,
    load_suite,
    plan,
    suite_names,
)
from deco_fast.experiments.values import is_evaluated
from deco_fast.sampling.writers import check_writable
from deco_fast.training.distributed import join_processes
from deco_fast.training.run_folder import RunFolder
from deco_fast.training.work import count_work


def run(options: argparse.Namespace) -> int:
    """Plan, then train and evaluate what is not done yet; the exit status."""
    given = {"weights": options.weights, "num": options.num, "reference": options.reference}
    evaluation = {key: value for key, value in given.items() if value is not None}
    suite = load_suite(options.suite, options.rows, options.seeds, evaluation)
    overrides = _overrides(options.set or [])
    runs = plan(suite, overrides)
    if options.write_configs is not None:
        return _write_configs(runs, options.write_configs)
    folder = options.out or Path("ablations") / suite.name
    check_writable(folder, "--out")
    where = SuiteFolder(folder)
    where.check(suite.evaluation.reference)
    if options.dry_run:
        return _dry_run(runs, suite.evaluation, where)
    # Imported here, so that --help and --dry-run do not wait for it.
    from deco_fast.experiments.runner import run_suite

    ops.check_backend("pixel_decoder", "flow_matching_loss")
    with join_processes(options.device) as processes:

        def say(line: str) -> None:
            if processes.is_main:
                print(line, flush=True)

        say(f"{suite.name}: {len(runs)} runs in {folder}")
        whole = load_suite(options.suite, evaluation=evaluation)
        # Of the main process, which writes it.
        table = _table(whole, runs, overrides, where, say) if processes.is_main else None
        status = run_suite(whole, runs, folder, processes, say, table)
        if status == 0 and processes.is_main:
            print((folder / MARKDOWN_FILE).read_text(encoding="utf-8"))
            print(f"table   {folder / MARKDOWN_FILE}")
            print(f"figure  {folder / FIGURE_FILES[0]}")
        return status


def _table(
    suite: Suite,
    runs: list[PlannedRun],
    overrides: dict[str, str],
    where: SuiteFolder,
    say: Callable[[str], None],
) -> list[PlannedRun]:
    """The runs to do, and those of the suite that this folder holds besides."""
    given = (run.seed for run in runs)
    there = sorted(seed for row in suite.rows for seed in where.seeds(row))
    seeds = tuple(dict.fromkeys((*suite.seeds, *given, *there)))
    try:
        planned = plan(suite.model_copy(update={"seeds": seeds}), overrides)
    except UserError as error:
        say(f"in the table only the rows that are asked for: {error}")
        return runs
    wanted = {run.name for run in runs}
    table = []
    for run in planned:
        folder = where.run(run)
        if run.name in wanted:
            table.append(run)
        elif folder.exists():
            try:
                RunFolder(folder, run.config).check(exactly=True)
                table.append(run)
            except UserError as error:
                say(f"not in the table: {error}")
    return table


def _dry_run(runs: list[PlannedRun], evaluation: Evaluation, folder: SuiteFolder) -> int:
    for planned in runs:  # nothing is listed that would be refused
        RunFolder(folder.run(planned), planned.config).check(exactly=True)
    for planned in runs:
        work = count_work(planned.config)
        training = planned.config.training
        state = "to do"
        if is_evaluated(folder.evaluations, planned.name, evaluation):
            state = "evaluated"
        elif (folder.run(planned) / "finished").exists():
            state = "trained"
        elif folder.run(planned).exists():
            state = "begun"
        print(
            f"{planned.name:<40} {state:<9} {work.parameters:>13,} parameters, "
            f"{training.steps:,} steps of {training.batch_size} images, "
            f"{work.training_flops / 1e9:,.2f} GFLOP each"
        )
    return 0


def _write_configs(runs: list[PlannedRun], folder: Path) -> int:
    check_writable(folder, "--write-configs")
    texts = {folder / f"{planned.name}.yaml": planned.config.to_yaml() for planned in runs}
    for file, text in texts.items():
        if file.is_file() and file.read_bytes() != text.encode():
            raise UserError(f"{file} is there and says something else: choose another folder")
    for file, text in texts.items():
        with atomic_file(file) as temporary:
            temporary.write_bytes(text.encode())
        print(file)
    return 0


def _overrides(words: list[str]) -> dict[str, str]:
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--set {word}: write --set section.key=value")
        values[key] = value
    return values


def add_parser(kinds: Any) -> None:
    """Add the command to the subparsers of `evaluate.py`."""
    ablate = kinds.add_parser(
        "ablate",
        help="train and evaluate a list of configurations on equal terms",
        description="Train every row of a suite from every seed, evaluate all alike, and write a "
        "table and a figure. Typed again it goes on where it was. Under torchrun all processes "
        "share each run, one for each GPU.",
    )
    ablate.add_argument(
        "--suite",
        required=True,
        metavar="NAME|FILE",
        help=f"{', '.join(suite_names())}, or a YAML file",
    )
    ablate.add_argument("--rows", nargs="+", metavar="ROW", help="only these (default: all)")
    ablate.add_argument(
        "--seeds",
        nargs="+",
        type=whole_number(0, 2**63 - 1),
        metavar="SEED",
        help="instead of the suite's",
    )
    ablate.add_argument(
        "--set",
        action="append",
        metavar="SECTION.KEY=VALUE",
        help="a key of the configuration, for all rows; may be repeated",
    )
    ablate.add_argument(
        "--reference",
        type=not_empty,
        metavar="PATH",
        help="images or statistics to compare with",
    )
    ablate.add_argument("--weights", type=not_empty, metavar="FILE", help="the feature extractor's")
    ablate.add_argument("--num", type=whole_number(1), help="images drawn of each run")
    ablate.add_argument(
        "--out", type=to_path, metavar="FOLDER", help="the suite's folder (default: ablations/NAME)"
    )
    ablate.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    ablate.add_argument(
        "--dry-run", action="store_true", help="list the runs, their cost and state, and stop"
    )
    ablate.add_argument(
        "--write-configs",
        type=to_path,
        metavar="FOLDER",
        help="write the configuration of each run as a file for train.py --config, and stop",
    )
    ablate.set_defaults(run=run)
