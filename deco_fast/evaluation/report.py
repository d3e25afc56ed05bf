"""The folder of an evaluation: its figures, and what they are of, in report.json."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.checkpoint.lock import alone_in
from deco_fast.errors import UserError

REPORT_FILE = "report.json"
EVALUATIONS = Path("evaluations")
"""Where the folders lie that the user does not name."""


@contextmanager
def report_folder(
    named: Path | None, default: str, source: Mapping[str, Any], files: Sequence[str] = ()
) -> Iterator[Path]:
    """The folder named, or the first of default, default-2 … that holds nothing of others.

    Until the end no other evaluation writes to it: where no folder is named it takes the next.

    Args:
        named: by the user.
        default: the name of the folder in `EVALUATIONS` where none is named.
        source: what is evaluated, as JSON gives it back.
        files: what is written beside the report.

    Raises:
        UserError: the folder named holds the report of something else, or such files without one,
            or is in use; or a folder cannot be used.
    """
    is_new = not EVALUATIONS.exists()
    try:
        with ExitStack() as held:
            if named is None:
                yield _first_free(default, source, files, held)
            else:
                _refuse_others(named, source, files)
                held.enter_context(alone_in(named))
                # Another program may have been in it until now.
                _refuse_others(named, source, files)
                yield named
    finally:
        if is_new:
            with suppress(OSError):  # not empty, or not made
                EVALUATIONS.rmdir()


def write_report(folder: Path, source: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Write report.json.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_file(folder / REPORT_FILE) as temporary:
        document = {"source": source, "report": report}
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _first_free(
    default: str, source: Mapping[str, Any], files: Sequence[str], held: ExitStack
) -> Path:
    for number in itertools.count(1):
        folder = EVALUATIONS / (default if number == 1 else f"{default}-{number}")
        if _of_others(folder, source, files):
            continue
        with ExitStack() as attempt:
            try:
                attempt.enter_context(alone_in(folder))
            except UserError as error:
                if isinstance(error.__cause__, BlockingIOError):  # in use
                    continue
                raise
            # Another program may have been in it until now.
            if not _of_others(folder, source, files):
                held.push(attempt.pop_all())
                return folder
    raise AssertionError("there is always another number")


def _refuse_others(folder: Path, source: Mapping[str, Any], files: Sequence[str]) -> None:
    if found := _of_others(folder, source, files):
        raise UserError(f"--out {folder} holds {found}: choose another --out")


def _of_others(folder: Path, source: Mapping[str, Any], files: Sequence[str]) -> str | None:
    """What a folder holds that would be written over and is not of this evaluation.

    Raises:
        UserError: that cannot be known.
    """
    try:
        report = (folder / REPORT_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        foreign = [name for name in files if (folder / name).exists()]
        return f"a {foreign[0]} that is not of a report" if foreign else None
    except UnicodeDecodeError:
        report = ""
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used for the report ({error.strerror}): choose another --out"
        ) from error
    with suppress(ValueError, TypeError, KeyError):
        if json.loads(report)["source"] == source:
            return None
    return "the report of other images, or of these before they changed"
