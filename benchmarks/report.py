"""The figures for people (Markdown, on the terminal too) and for programs (JSON)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import Comparison, Row
from benchmarks.markdown import markdown_table
from benchmarks.models import ModelTable, describe_models

FORMATS = (".json", ".md")


def _unless_none(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else format(value * factor, form)


def _milliseconds(seconds: float | None) -> str:
    """Four digits, and never an exponent."""
    if seconds is None:
        return ""
    return format(seconds * 1e3, ",.0f" if seconds >= 1 else ".4g")


def _mib(value: int | None) -> str:
    return _unless_none(value, ",.1f", 2**-20)


def _cells(row: Row) -> dict[str, str]:
    spread = ""
    if row.minimum is not None and row.maximum is not None:
        spread = f"{_milliseconds(row.minimum)} – {_milliseconds(row.maximum)}"
    return {
        "variant": row.variant,
        "median ms": _milliseconds(row.median),
        "min – max ms": spread,
        "rounds": str(row.rounds or ""),
        "speed": _unless_none(row.speedup, ".2f") + ("×" if row.speedup else ""),
        "of floor": _unless_none(row.floor_fraction, ".1%"),
        "data wait": _unless_none(row.data_wait_share, ".2%"),
        "saved MiB": _mib(row.saved_for_backward),
        "peak MiB": _mib(row.peak_memory),
        "error": _unless_none(row.error, ".0e"),
        "remark": f"skipped: {row.skipped}" if row.skipped else row.remark or "",
    }


def describe_comparison(comparison: Comparison) -> str:
    """A comparison's conditions, floor and table."""
    return (
        f"### {comparison.title}\n\n"
        f"{comparison.conditions}. Least work {comparison.flops / 1e9:.4g} GFLOP, "
        f"{comparison.bytes / 1e6:.4g} MB: floor {comparison.floor * 1e3:.3g} ms "
        f"({comparison.bound}).\n\n" + markdown_table([_cells(row) for row in comparison.rows])
    )


def describe_machine(machine: dict[str, Any]) -> str:
    """One line on the machine and its measured peaks."""
    rates = ", ".join(
        f"{dtype} product {rate / 1e9:,.0f} GFLOP/s"
        for dtype, rate in machine["gemm_flops_per_second"].items()
    )
    return (
        f"{machine['device']}, {machine['threads']} threads ({machine['cpu_capability']}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {rates}, "
        f"copy {machine['copy_bytes_per_second'] / 1e9:,.1f} GB/s"
    )


def entry(record: dict[str, Any], comparisons: Sequence[Comparison]) -> str:
    """A record as a section of RECORDS.md."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"## {record['date'][:10]}, {machine['device']}",
        "",
        f"- commit: {record['commit']}",
        f"- machine: {describe_machine(machine)}; {machine['system']}",
        f"- versions: {versions}",
        f"- command: `{record['command']}`",
    ]
    if record["note"]:
        lines.append(f"- note: {record['note']}")
    if record["failed"]:
        lines.append(f"- incomplete: {record['failed']} comparisons failed")
    tables = [describe_comparison(comparison) for comparison in comparisons]
    tables += [describe_models(ModelTable.from_json(table)) for table in record["models"]]
    return "\n".join(lines) + "\n\n" + "\n\n".join(tables) + "\n"


def check_path(path: Path) -> None:
    """See that a record can be written there.

    Raises:
        pytest.UsageError: another ending than .json and .md, no such folder, or no right to write.
    """
    if path.suffix not in FORMATS:
        raise pytest.UsageError(f"--record {path}: the name must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise pytest.UsageError(f"--record {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        raise pytest.UsageError(f"--record {path}: cannot be written; choose another file")


def save(path: Path, record: dict[str, Any], comparisons: Sequence[Comparison]) -> None:
    """Write the record as JSON, or append it to a Markdown file."""
    if path.suffix == ".json":
        full = {**record, "comparisons": [comparison.to_json() for comparison in comparisons]}
        path.write_text(json.dumps(full, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + entry(record, comparisons))
