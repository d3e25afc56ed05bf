"""Figures by matplotlib, without its global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        # Imported here, as matplotlib is optional and takes a second.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "figures need the package matplotlib: pip install 'deco-fast[figures]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def plain(text: str) -> str:
    """A name as matplotlib is to show it: between two $ it would read a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, paths: Sequence[Path]) -> None:
    """Write it in the formats of the files' names, PNG or SVG.

    Raises:
        UserError: a file cannot be written.
    """
    for path in paths:
        with atomic_file(path) as temporary:
            # Without the date the same figures give the same file.
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=_undated(path))


def _undated(path: Path) -> dict[str, None] | None:
    return {"Date": None} if path.suffix == ".svg" else None
