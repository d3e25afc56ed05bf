"""Spectra as a table and as a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.evaluation.figures import new_figure, plain, save_figure
from deco_fast.evaluation.spectrum import DIT_OUTPUT, TRUE_VELOCITY, VELOCITY, Spectrum

TRUE = "true"
"""What the true velocity is called beside the models."""

_COLUMNS = ("model", "signal", "timestep", "frequency", "energy", "share")
_TITLES = {DIT_OUTPUT: "DiT output", VELOCITY: "pixel velocity"}


def write_csv(spectra: Sequence[Spectrum], path: Path) -> None:
    """A row for each model, signal, time and frequency (its place in the zig-zag order, from 0).

    Raises:
        UserError: it cannot be written.
    """
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for spectrum in spectra:
            pairs = zip(spectrum.energy.tolist(), spectrum.share.tolist(), strict=True)
            for frequency, (energy, share) in enumerate(pairs):
                head = (spectrum.model, spectrum.signal, f"{spectrum.timestep:g}", frequency)
                writer.writerow((*head, f"{energy:.9g}", f"{share:.9g}"))


def draw_spectra(spectra: Sequence[Spectrum], paths: Sequence[Path]) -> None:
    """The share of the energy over the frequencies: a row for each signal, a column for each time.

    Args:
        spectra: of one model or several beside each other.
        paths: PNG or SVG files.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    signals = [signal for signal in _TITLES if any(s.signal == signal for s in spectra)]
    timesteps = sorted({spectrum.timestep for spectrum in spectra})
    models = list(dict.fromkeys(spectrum.model for spectrum in spectra if spectrum.model))
    figure = new_figure(2.6 * len(timesteps) + 1, 2.6 * len(signals) + 0.8)
    grid = figure.subplots(len(signals), len(timesteps), squeeze=False, sharey="row")
    for row, signal in zip(grid, signals, strict=True):
        for axes, timestep in zip(row, timesteps, strict=True):
            for spectrum in spectra:
                if spectrum.timestep != timestep:
                    continue
                if spectrum.signal == signal:
                    axes.semilogy(
                        spectrum.share.numpy(),
                        color=f"C{models.index(spectrum.model)}",
                        linewidth=1.3,
                        label=_label(spectrum.model),
                    )
                elif signal == VELOCITY and spectrum.signal == TRUE_VELOCITY:
                    axes.semilogy(
                        spectrum.share.numpy(), "--", color="0.6", linewidth=1, label=TRUE
                    )
            axes.set_title(f"{_TITLES[signal]}, t = {timestep:g}", fontsize=9)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("share of the energy")
        row[-1].legend(fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("frequency (zig-zag order)", fontsize=8)
    save_figure(figure, paths)


def _label(name: str) -> str:
    # A label that begins with "_" has no place in a legend.
    return plain(f" {name}" if name.startswith("_") else name)


def high_share_lines(spectra: Sequence[Spectrum]) -> list[str]:
    """A table for people: what share the upper half of the frequencies has, by time."""
    timesteps = sorted({spectrum.timestep for spectrum in spectra})
    found = {(s.model or TRUE, s.signal, s.timestep): s.high_share for s in spectra}
    names = list(dict.fromkeys((model, signal) for model, signal, _ in found))
    titles = [f"{_TITLES.get(signal, 'pixel velocity')}, {model}" for model, signal in names]
    width = max(map(len, titles))
    lines = [f"{'upper half of the energy, t =':<{width}}" + "".join(f"{t:>9g}" for t in timesteps)]
    for title, name in zip(titles, names, strict=True):
        shares = "".join(f"{found[name[0], name[1], t]:>9.2%}" for t in timesteps)
        lines.append(f"{title:<{len(lines[0]) - 9 * len(timesteps)}}{shares}")
    return lines
