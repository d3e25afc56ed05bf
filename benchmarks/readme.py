"""The README's figures, from the records: `python -m benchmarks.readme` writes them.

Every JSON file in benchmarks/records is one run of the suite (`--record FILE.json`, or
`python -m benchmarks.record`). For each comparison the README gets the better baseline and the
fastest of ours, also where ours was limited to what a lesser processor has; benchmarks/RECORDS.md
has the whole tables.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.report import describe_machine

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RECORDS = ROOT / "benchmarks" / "records"
BEGIN = "<!-- figures: written by python -m benchmarks.readme -->"
END = "<!-- end of the figures -->"


def section(records: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown, the newest first."""
    newest_first = sorted(records, key=lambda record: str(record["date"]), reverse=True)
    return "\n\n".join(_machine(record) for record in newest_first)


def _machine(record: dict[str, Any]) -> str:
    versions = record["machine"]["versions"]
    heading = (
        f"{describe_machine(record['machine'])}; torch {versions['torch']}; "
        f"{record['date'][:10]}, commit {record['commit']}:"
    )
    rows = [row for comparison in record["comparisons"] for row in _row(comparison)]
    return f"{heading}\n\n{markdown_table(rows)}"


def _row(comparison: dict[str, Any]) -> Iterator[dict[str, str]]:
    timed = [row for row in comparison["rows"] if row["median"] is not None]
    baselines = [row for row in timed if row["is_baseline"]]
    # Of ours only what computes as exactly as the baseline.
    ours = [row for row in timed if not row["is_baseline"] and "high" not in row["variant"]]
    for limited in (False, True):
        rows = [row for row in ours if ("limited to" in row["variant"]) is limited]
        if not baselines or not rows:
            continue
        baseline = min(baselines, key=lambda row: row["median"])
        best = min(rows, key=lambda row: row["median"])
        yield {
            "task": _task(comparison),
            "best baseline": f"{_time(baseline)} ({_way(baseline)})",
            "deco_fast": f"{_time(best)} ({_way(best)})",
            "speed": f"{baseline['median'] / best['median']:.2f}×",
            "of floor": f"{best['floor_fraction']:.0%}",
            "saved for backward": _share(baseline, best, "saved_for_backward"),
            # Not of an engine: its CUDA graphs' memory is beside what is measured.
            "peak memory": (
                ""
                if comparison["title"].startswith("sampling")
                else _share(baseline, best, "peak_memory")
            ),
        }


def _task(comparison: dict[str, Any]) -> str:
    """The title; of sampling also when it is guided, as the engine skips half of the other steps
    and the published loop does not: a gain that is no speed of the code."""
    found = re.search(r"guidance \S+ in \((\S+), (\S+)\)", comparison["conditions"])
    if found is None:
        return str(comparison["title"])
    interval = (
        "throughout" if found.groups() == ("0.0", "1.0") else "in ({}, {}]".format(*found.groups())
    )
    return f"{comparison['title']}, guided {interval}"


def _time(row: dict[str, Any]) -> str:
    milliseconds = row["median"] * 1e3
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _way(row: dict[str, Any]) -> str:
    """The variant's name without the precision, which the title has."""
    return str(row["variant"]).rsplit(", ", 1)[0]


def _share(baseline: dict[str, Any], ours: dict[str, Any], key: str) -> str:
    before, after = baseline.get(key), ours.get(key)
    if not before or after is None:
        return ""
    return f"{after / before:.1%}"


def updated(readme: str, figures: str) -> str:
    """The README with these figures.

    Raises:
        ValueError: it has no place for them.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def load_records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def main() -> int:
    """Write the README."""
    text = README.read_text(encoding="utf-8")
    README.write_text(updated(text, section(load_records())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
