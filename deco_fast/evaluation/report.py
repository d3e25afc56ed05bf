"""The folder of an evaluation: its figures, and what they are of, in report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.errors import UserError

REPORT_FILE = "report.json"


def report_folder(
    named: Path | None, default: Path, source: Mapping[str, Any], files: Sequence[str] = ()
) -> Path:
    """The folder named, or the first of default, default-2 … without the report of others.

    Args:
        named: by the user.
        default: where none is named.
        source: what is evaluated, as JSON gives it back.
        files: what is written beside the report.

    Raises:
        UserError: the folder named holds the report of something else, or such files without one.
    """
    if named and not (named / REPORT_FILE).exists():
        foreign = [name for name in files if (named / name).exists()]
        if foreign:
            raise UserError(
                f"--out {named} holds a {foreign[0]} that is not of a report: choose another --out"
            )
    if named:
        if _holds_another_report(named, source):
            raise UserError(f"--out {named} holds the report of other images: choose another --out")
        return named
    folder, count = default, 1
    while _holds_another_report(folder, source):
        count += 1
        folder = default.with_name(f"{default.name}-{count}")
    return folder


def write_report(folder: Path, source: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Write report.json.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_file(folder / REPORT_FILE) as temporary:
        document = {"source": source, "report": report}
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _holds_another_report(folder: Path, source: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / REPORT_FILE).read_text())["source"] != source)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError):
        return True
