"""`python evaluate.py spectrum`: where in the spectrum a model works."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deco_fast import __version__
from deco_fast.checkpoint import load_checkpoint
from deco_fast.checkpoint.checksums import weights_checksum
from deco_fast.checkpoint.find import locate
from deco_fast.checkpoint.format import WEIGHTS
from deco_fast.cli.parser import checked, not_empty, one_of, to_path, whole_number
from deco_fast.errors import UserError
from deco_fast.evaluation.fingerprint import files_fingerprint
from deco_fast.evaluation.report import EVALUATIONS, report_folder, write_report
from deco_fast.evaluation.spectrum import (
    TIMESTEPS,
    LabelledBatch,
    Spectrum,
    measure_spectra,
    parse_timesteps,
)
from deco_fast.evaluation.spectrum_images import DIGITS, SpectrumImages, open_labelled
from deco_fast.evaluation.spectrum_report import (
    TRUE,
    draw_spectra,
    high_share_lines,
    write_csv,
)
from deco_fast.models.config import class_config
from deco_fast.models.network import DeCoNetwork
from deco_fast.sampling.batch_size import default_batch_size
from deco_fast.sampling.source import checkpoint_name, default_checkpoint
from deco_fast.sampling.writers import check_writable
from deco_fast.training.distributed import pick_device

CSV_FILE = "spectrum.csv"
FIGURE_FILES = ("spectrum.png", "spectrum.svg")


def run(options: argparse.Namespace) -> int:
    """Measure each checkpoint on the same images and noise; the exit status."""
    check_writable(options.out or EVALUATIONS, "--out")
    device = pick_device(options.device)
    timesteps = TIMESTEPS if options.timesteps is None else parse_timesteps(options.timesteps)
    paths = _named(options)
    models = {name: load_checkpoint(path, options.weights, device) for name, path in paths.items()}
    height, width = _common_size(models)
    images = {
        name: open_labelled(
            options.images, height, width, class_config(model.config, paths[name]).num_classes
        )
        for name, model in models.items()
    }
    source: dict[str, Any] = {
        "checkpoints": {name: str(path) for name, path in paths.items()},
        "weights_checksums": {name: weights_checksum(model) for name, model in models.items()},
        "images": options.images,
        "files": None if options.images == DIGITS else files_fingerprint(options.images),
        "num": options.num,
        "seed": options.seed,
        "timesteps": list(timesteps),
        "deco_fast": __version__,
    }
    default = f"spectrum-{'-'.join(models)}"
    files = (CSV_FILE, *FIGURE_FILES)
    with report_folder(options.out, default, source, files) as folder:
        batch_size = options.batch_size or default_batch_size(device, height, width)
        spectra: list[Spectrum] = []
        for name, model in models.items():
            count = min(options.num, len(images[name]))
            found = measure_spectra(
                model,
                name,
                _batches(images[name], count, batch_size, name),
                timesteps=timesteps,
                seed=options.seed,
                device=device,
            )
            # The true velocity is that of the images, whatever the model.
            spectra += [spectrum for spectrum in found if spectrum.model or not spectra]
            print(f"{name}: {count:,} images of {height}×{width}, {images[name].labelling}")
        print("\n".join(high_share_lines(spectra)))
        # First the report, by which the next call knows the other files for its own.
        write_report(folder, source, {"spectra": CSV_FILE})
        write_csv(spectra, folder / CSV_FILE)
        print(f"numbers {folder / CSV_FILE}")
        draw_spectra(spectra, [folder / name for name in FIGURE_FILES])
        print(f"figure  {folder / FIGURE_FILES[0]} (.svg)")
    return 0


def _batches(
    images: SpectrumImages, count: int, batch_size: int, name: str
) -> Iterable[LabelledBatch]:
    batches = images.batches(count, batch_size)
    return tqdm(batches, total=-(-count // batch_size), desc=name, unit="batch")


def _named(options: argparse.Namespace) -> dict[str, Path]:
    """The checkpoints by the names that they have in the figure.

    Raises:
        UserError: one does not exist, has a name that cannot be used, or that of another.
    """
    if not options.checkpoints:
        path, reason = default_checkpoint(options.runs)
        print(f"{path} ({reason})")
        return {_checked_name(checkpoint_name(path), str(path)): locate(path)}
    named: dict[str, Path] = {}
    for word in options.checkpoints:
        name, equals, path = word.partition("=")
        if not equals or os.path.exists(os.path.expanduser(word)):
            located, path = locate(word), word
            name = checkpoint_name(located.absolute())
        elif not path:
            raise UserError(f"'{word}' names no checkpoint: NAME=PATH")
        elif set("/\\") & set(name):
            raise UserError(
                f"{word} does not exist, and '{name}' is no name for a folder: check the path, or "
                "give another NAME=PATH"
            )
        else:
            located = locate(path)
        if _checked_name(name, path) in named:
            raise UserError(f"two checkpoints are called '{name}': name them, NAME={path}")
        named[name] = located
    return named


def _checked_name(name: str, path: str) -> str:
    """The name.

    Raises:
        UserError: it is empty, or that of the true velocity.
    """
    if name and name != TRUE:
        return name
    reason = f"'{name}' is what the true velocity is called" if name else "a name is empty"
    raise UserError(f"{reason}: name the checkpoint otherwise, NAME={path}")


def _common_size(models: dict[str, DeCoNetwork]) -> tuple[int, int]:
    sizes = {}
    for name, model in models.items():
        assert model.card is not None
        sizes[name] = (model.card.height, model.card.width)
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {height}×{width}" for name, (height, width) in sizes.items())
        raise UserError(f"the checkpoints draw images of several sizes ({listed}): compare one")
    return next(iter(sizes.values()))


def add_parser(kinds: Any) -> None:
    """Add the command to the subparsers of `evaluate.py`."""
    spectrum = kinds.add_parser(
        "spectrum",
        help="DCT energy spectra of the DiT's output and of the velocity",
        description="Measure the energy of each DCT frequency (8×8 blocks, zig-zag order) of the "
        "DiT's output and of the pixel velocity over time, as the paper's empirical analysis "
        "does: a CSV file and a figure, several checkpoints beside each other.",
    )
    spectrum.add_argument(
        "checkpoints",
        type=not_empty,
        nargs="*",
        metavar="[NAME=]PATH",
        help="as for sample.py --checkpoint, with the name for the figure (default: the newest run "
        "that has finished, else the checkpoint that ships with the package)",
    )
    spectrum.add_argument(
        "--runs",
        type=to_path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where runs are looked for (default: %(default)s)",
    )
    spectrum.add_argument(
        "--images",
        type=not_empty,
        default=DIGITS,
        metavar="FOLDER",
        help="class folders, or any images (default: the built-in, held-out %(default)s)",
    )
    spectrum.add_argument(
        "--num", type=whole_number(1), default=256, help="images (default: %(default)s)"
    )
    spectrum.add_argument(
        "--timesteps",
        type=checked(parse_timesteps),
        metavar="LIST",
        help=f"0 noise … 1 data (default: {','.join(map(str, TIMESTEPS))})",
    )
    spectrum.add_argument("--weights", type=one_of(WEIGHTS), default="ema", help="ema or model")
    spectrum.add_argument(
        "--seed",
        type=whole_number(0, 2**64 - 1),
        default=0,
        help="of the noise (default: %(default)s)",
    )
    spectrum.add_argument("--batch-size", type=whole_number(1), help="(default: by the device)")
    spectrum.add_argument(
        "--device", default="auto", help="auto, cpu or cuda (default: %(default)s)"
    )
    spectrum.add_argument(
        "--out",
        type=to_path,
        metavar="FOLDER",
        help="for numbers and figure (default: evaluations/spectrum-…)",
    )
    spectrum.set_defaults(run=run)
