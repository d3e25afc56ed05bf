"""Draw a record's speed and memory: python -m benchmarks.chart RECORD.json CHART.svg

One group of bars for each comparison of the fused ops, the faster of the rows in each way of
running: eager, torch.compile, fused. The rows for lesser processors are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deco_fast.errors import UserError, run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASKS = ("pixel decoder, ", "flow-matching loss, ")
WAYS = ("eager", "torch.compile", "fused")
COLOURS = ("#b8bec6", "#7d8794", "#0b6e4f")
FORMATS = (".svg", ".png")


class Bars(NamedTuple):
    """One comparison.

    Attributes:
        title: the task and its precision.
        seconds, saved: of each of WAYS, the median and the bytes kept for the backward pass; None
            where there is no such row.
    """

    title: str
    seconds: tuple[float | None, ...]
    saved: tuple[float | None, ...]


def _way(row: dict[str, Any]) -> str:
    if not row["is_baseline"]:
        return "fused"
    return "torch.compile" if "torch.compile" in row["variant"] else "eager"


def bars_of(comparison: dict[str, Any]) -> Bars:
    """The bars of a comparison as `--record` writes it."""
    timed = [
        row
        for row in comparison["rows"]
        if row["median"] is not None and "limited to" not in row["variant"]
    ]
    fastest = [
        min((row for row in timed if _way(row) == way), key=lambda row: row["median"], default={})
        for way in WAYS
    ]
    return Bars(
        comparison["title"],
        tuple(row.get("median") for row in fastest),
        tuple(row.get("saved_for_backward") for row in fastest),
    )


def read_record(path: Path) -> tuple[list[Bars], str]:
    """The bars of a record's comparisons of the fused ops, and a line on the machine.

    Raises:
        UserError: it cannot be read, or holds none of these comparisons.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        bars = [
            bars_of(comparison)
            for comparison in record["comparisons"]
            if comparison["title"].startswith(TASKS)
        ]
        machine = record["machine"]
        where = f"{machine['device']}, {machine['threads']} threads, {record['date'][:10]}"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another record") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no record; make one with pytest's --record FILE.json"
        ) from error
    if not bars:
        raise UserError(f"{path} has no comparison of the decoder or the loss; record them first")
    return bars, where


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.3g} MiB" if size < 2**30 else f"{size / 2**20:,.0f} MiB"


def _draw(
    axes: Axes,
    titles: Sequence[str],
    groups: Sequence[tuple[float | None, ...]],
    label: Any,
) -> None:
    """Horizontal bars, each group relative to its longest."""
    height = 0.8 / len(WAYS)
    for group, values in enumerate(groups):
        longest = max(value for value in values if value is not None)
        for way, value in enumerate(values):
            if value is None:
                continue
            place = group + (way - 1) * height
            axes.barh(place, value / longest, height * 0.92, color=COLOURS[way])
            ours = WAYS[way] == "fused"
            axes.text(
                value / longest + 0.015,
                place,
                label(value),
                va="center",
                size=8,
                weight="bold" if ours else "normal",
                color=COLOURS[way] if ours else "#3a4048",
            )
    axes.set_yticks(range(len(titles)), titles, size=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _two_lines(bars: Sequence[Bars]) -> list[str]:
    return [bar.title.replace(", ", ",\n", 1) for bar in bars]


def draw(bars: Sequence[Bars], where: str, path: Path) -> None:
    """Write the chart: time on the left, memory kept for the backward pass on the right.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt
        from matplotlib.patches import Patch
    except ImportError as error:
        raise UserError("the chart needs matplotlib: pip install matplotlib") from error
    # Text stays text: smaller, and sharp in the reader's own font. The salt and no date: the same
    # record gives the same file.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "deco", "font.size": 9})
    kept = [bar for bar in bars if any(bar.saved)]
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(11, 1.2 + 0.62 * len(bars)),
        layout="constrained",
        gridspec_kw={"width_ratios": (1, 1)},
    )
    _draw(axes[0], _two_lines(bars), [bar.seconds for bar in bars], _milliseconds)
    axes[0].set_title("time, shorter is better", loc="left", size=10)

    _draw(axes[1], _two_lines(kept), [bar.saved for bar in kept], _mib)
    axes[1].set_title("memory kept for the backward pass", loc="left", size=10)
    figure.legend(
        handles=[Patch(color=c, label=way) for way, c in zip(WAYS, COLOURS, strict=True)],
        loc="outside upper right",
        ncols=len(WAYS),
        frameon=False,
    )
    figure.supxlabel(where, size=8, color="#5a626c", x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white", metadata=_no_date(path))
    plt.close(figure)


def _no_date(path: Path) -> dict[str, None] | None:
    return {"Date": None} if path.suffix == ".svg" else None


@run_command
def main(argv: list[str] | None = None) -> int:
    """Read the record, write the chart.

    Raises:
        UserError: the record cannot be used, or the chart not be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chart",
        description="Draw speed and memory from a record of the benchmarks.",
    )
    parser.add_argument("record", type=Path, help="what pytest's --record FILE.json wrote")
    parser.add_argument("chart", type=Path, help="the file to write, .svg or .png")
    options = parser.parse_args(argv)
    if options.chart.suffix not in FORMATS:
        raise UserError(f"{options.chart}: the name must end in {' or '.join(FORMATS)}")
    bars, where = read_record(options.record)
    try:
        draw(bars, where, options.chart)
    except OSError as error:
        raise UserError(f"{options.chart} cannot be written ({error.strerror})") from error
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
