"""The folder of a suite: what lies where, and that it is a suite's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from deco_fast import __version__
from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.errors import UserError
from deco_fast.experiments.suite import DATASET, PlannedRun, Row, run_name

CSV_FILE = "results.csv"
MARKDOWN_FILE = "results.md"
FIGURE_FILES = ("results.png", "results.svg")
STATISTICS_FILE = "reference.npz"
NOTE_FILE = "reference.json"

_EVALUATIONS = "evaluations"
_RUNS = "runs"
_MARKER_FILE = "suite.json"
# Runs are not among them: a run's folder says itself whose it is.
_WRITTEN = (
    CSV_FILE,
    MARKDOWN_FILE,
    *FIGURE_FILES,
    STATISTICS_FILE,
    NOTE_FILE,
    _EVALUATIONS,
    _MARKER_FILE,
)


class SuiteFolder(NamedTuple):
    """Where a suite lies: runs/, evaluations/, the reference, the tables and the figure."""

    path: Path

    def run(self, run: PlannedRun) -> Path:
        """The run folder of a training, as train.py makes it."""
        return self.path / _RUNS / run.name

    def seeds(self, row: Row) -> list[int]:
        """From which a row has been trained here, the smallest first."""
        runs = self.path / _RUNS
        begin = run_name(row, "")
        ends = (path.name.removeprefix(begin) for path in runs.glob(f"{begin}*"))
        return sorted(int(end) for end in ends if end.isdecimal())

    @property
    def evaluations(self) -> Path:
        """Where the figures of the runs are kept."""
        return self.path / _EVALUATIONS

    def check(self, reference: str) -> None:
        """See that nothing of others would be written over.

        Args:
            reference: of the suite's evaluation.

        Raises:
            UserError: the folder holds files of a suite's names and is none's, or the reference
                lies among what the suite writes.
        """
        # Looked for first: another process may be about to mark the folder.
        there = [name for name in _WRITTEN if (self.path / name).exists()]
        if there and not self._is_a_suite():
            raise UserError(
                f"--out {self.path} holds a {there[0]} that is not of a suite: choose another --out"
            )
        if reference == DATASET:
            return
        given, here = Path(reference).resolve(), self.path.resolve()
        written = [here / name for name in (*_WRITTEN, _RUNS)]
        if here.is_relative_to(given) or any(map(given.is_relative_to, written)):
            raise UserError(
                f"--reference {reference} lies among what the suite writes into {self.path}, or "
                "holds it: choose another --out"
            )

    def claim(self) -> None:
        """Mark the folder as a suite's.

        Raises:
            UserError: it cannot be written.
        """
        if not self._is_a_suite():
            with atomic_file(self.path / _MARKER_FILE) as temporary:
                temporary.write_text(json.dumps({"deco_fast": __version__}) + "\n")

    def _is_a_suite(self) -> bool:
        # The reference's note is a suite's as well, where there is no other mark.
        keys = {_MARKER_FILE: {"deco_fast"}, NOTE_FILE: {"identity", "rows", "extractor"}}
        return any(_holds(self.path / name, wanted) for name, wanted in keys.items())


def _holds(path: Path, keys: set[str]) -> bool:
    """Whether a file has these keys in its JSON."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and keys <= document.keys()
