"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence

_WORDS = ("variant", "remark", "task", "best baseline", "deco_fast")
"""Columns that begin at the left, other than those of numbers."""


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Cells as a padded Markdown table; a column that is empty throughout is left out."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}

    def line(cells: dict[str, str]) -> str:
        padded = (
            cells[name].ljust(widths[name]) if name in _WORDS else cells[name].rjust(widths[name])
            for name in columns
        )
        return f"| {' | '.join(padded)} |".rstrip()

    rule = {
        name: "-" * widths[name] if name in _WORDS else "-" * (widths[name] - 1) + ":"
        for name in columns
    }
    return "\n".join([line({name: name for name in columns}), line(rule), *map(line, rows)])
