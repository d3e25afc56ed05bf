"""The results of a suite: Markdown and CSV tables, and a figure."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.evaluation.figures import new_figure, plain, save_figure
from deco_fast.experiments.folder import CSV_FILE, FIGURE_FILES, MARKDOWN_FILE
from deco_fast.experiments.suite import Suite

_TITLES = {
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "inception_score": "Inception score ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "spectral_error": "spectral error, dB ↓",
    "dit_high_share": "upper half of the DiT's spectrum",
}


class RunResult(NamedTuple):
    """The figures of one run.

    Attributes:
        row: its name.
        seed: of the training; of the choice for real images.
        parameters: of the network; None for real images.
        values: by metric.
    """

    row: str
    seed: int
    parameters: int | None
    values: Mapping[str, float]


def titles(suite: Suite) -> dict[str, str]:
    """The metrics' names for people."""
    features = suite.evaluation.features
    if features == "inception":
        return _TITLES
    return _TITLES | {"fid": f"Fréchet distance, {features} ↓"}


def write_tables(suite: Suite, results: Sequence[RunResult], planned: int, folder: Path) -> None:
    """Write results.csv (a line for each run), results.md (for each row) and the figure.

    Args:
        suite: what was run.
        results: so far.
        planned: runs that there will be.
        folder: the suite's.

    Raises:
        UserError: a file cannot be written.
    """
    metrics = list(dict.fromkeys(name for result in results for name in result.values))
    with (
        atomic_file(folder / CSV_FILE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("row", "seed", "parameters", *metrics))
        for result in results:
            values = [result.values.get(name, "") for name in metrics]
            writer.writerow((result.row, result.seed, result.parameters or "", *values))
    with atomic_file(folder / MARKDOWN_FILE) as temporary:
        temporary.write_text(markdown(suite, results, planned, metrics), encoding="utf-8")
    _draw(suite, results, metrics, [folder / name for name in FIGURE_FILES])


def markdown(
    suite: Suite, results: Sequence[RunResult], planned: int, metrics: Sequence[str]
) -> str:
    """The table, with the mean over the seeds ± their standard deviation."""
    names = titles(suite)
    papers = {row.name: row.paper for row in suite.rows}
    with_paper = [name for name in metrics if any(name in paper for paper in papers.values())]
    head = ["", "parameters", "seeds", *(names[name] for name in metrics)]
    # The paper's are in the features of Inception, whatever ours are in.
    head += [f"{_TITLES.get(name, names[name])}, the paper's" for name in with_paper]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row, group in _groups(results).items():
        parameters = group[0].parameters
        cells = [row.replace("|", r"\|"), f"{parameters:,}" if parameters else "", str(len(group))]
        cells += [_spread([r.values[name] for r in group if name in r.values]) for name in metrics]
        found = papers.get(row, {})
        cells += [f"{found[name]:g}" if name in found else "" for name in with_paper]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = dict.fromkeys(result.seed for result in results if result.parameters is not None)
    trained = sum(result.parameters is not None for result in results)
    evaluation = suite.evaluation
    # The description is a folded text of its own; what follows is what a reader has to know.
    notes = [
        f"# {suite.name}",
        "",
        suite.description.strip(),
        "",
        *lines,
        "",
        f"{trained} of {planned} runs; mean ± standard deviation over the seeds "
        f"({', '.join(map(str, seeds))}). "
        f"{evaluation.num:,} images each, drawn with the averaged weights, in the features of "
        f"{evaluation.features}; reference: {evaluation.reference}.",
        "",
    ]
    return "\n".join(notes)


def _groups(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.row, []).append(result)
    return groups


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def _draw(
    suite: Suite, results: Sequence[RunResult], metrics: Sequence[str], paths: Sequence[Path]
) -> None:
    """A panel for each metric, a line for each row: a dot for each seed, a bar at their mean."""
    names = titles(suite)
    groups = _groups(results)
    figure = new_figure(1.5 + 2.8 * len(metrics), 1.2 + 0.4 * len(groups))
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for place, group in enumerate(groups.values()):
            values = [result.values[metric] for result in group if metric in result.values]
            if values:
                axes.plot(values, [place] * len(values), "o", color=f"C{place % 10}", alpha=0.6)
                mean = statistics.fmean(values)
                axes.plot([mean], [place], "|", color="black", markersize=16)
        axes.set_title(names[metric], fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(groups)), list(map(plain, groups)))
    panels[0].invert_yaxis()
    save_figure(figure, paths)
