"""`python evaluate.py digits`: how good are the digits drawn?"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deco_fast import __version__
from deco_fast.checkpoint import load_checkpoint
from deco_fast.checkpoint.checksums import weights_checksum
from deco_fast.checkpoint.find import locate
from deco_fast.checkpoint.format import WEIGHTS
from deco_fast.cli.parser import checked, not_empty, number, one_of, to_path, whole_number
from deco_fast.errors import UserError
from deco_fast.evaluation.digits import DigitsEvaluator
from deco_fast.evaluation.fingerprint import files_fingerprint
from deco_fast.evaluation.npz import READ_ERRORS
from deco_fast.evaluation.report import EVALUATIONS, REPORT_FILE, report_folder, write_report
from deco_fast.models.config import class_config
from deco_fast.models.network import DeCoNetwork
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import save_grid
from deco_fast.sampling.recipes import resolve_settings
from deco_fast.sampling.run import draw, labels_for
from deco_fast.sampling.source import checkpoint_name, default_checkpoint
from deco_fast.sampling.writers import check_writable
from deco_fast.solvers import check_solver
from deco_fast.training.distributed import pick_device

PAIRS_FILE = "pairs.png"

_PAIRS = 100
_DRAWING_DEFAULTS: dict[str, Any] = {"num": 1000, "seed": 0, "weights": "ema", "device": "auto"}
_SETTINGS = ("steps", "solver", "guidance_scale")


class _Images(NamedTuple):
    """Images to evaluate, not there yet: what can be wrong is found before they are drawn.

    Attributes:
        name: for the folder of the report.
        source: where they come from, as JSON gives it back.
        get: returns uint8 (N, H, W, 3) and labels (N,).
    """

    name: str
    source: dict[str, Any]
    get: Callable[[], tuple[Tensor, Tensor]]


def run(options: argparse.Namespace) -> int:
    """Draw or read the images, evaluate; the exit status."""
    check_writable(options.out or EVALUATIONS, "--out")
    chosen = _from_file(options) if options.images else _from_checkpoint(options)
    with report_folder(
        options.out, f"digits-{chosen.name}", chosen.source, (PAIRS_FILE,)
    ) as folder:
        _evaluate(chosen, folder)
    return 0


def _evaluate(chosen: _Images, folder: Path) -> None:
    images, labels = chosen.get()
    try:
        evaluator = DigitsEvaluator(images.shape[1])
        report = evaluator.evaluate(images, labels)
    except ValueError as error:
        raise UserError(f"{chosen.name} holds no digits: {error}") from error
    _, nearest = evaluator.nearest_training_digits(images[:_PAIRS])
    print(report)
    # First the report, by which the next call knows the picture for its own.
    write_report(folder, chosen.source, report.to_json())
    save_grid(torch.cat([images[:_PAIRS], nearest], dim=2), folder / PAIRS_FILE)
    print(f"report  {folder / REPORT_FILE}")
    print(f"pairs   {folder / PAIRS_FILE} (left drawn, right the nearest training digit)")


def _from_checkpoint(options: argparse.Namespace) -> _Images:
    """Images to be drawn as the sampling command does.

    Raises:
        UserError: there is no such checkpoint or device, or it does not draw digits.
    """
    drawing = {
        option: default if (given := getattr(options, option)) is None else given
        for option, default in _DRAWING_DEFAULTS.items()
    }
    device = pick_device(drawing["device"])
    named, reason = (
        (options.checkpoint, "") if options.checkpoint else default_checkpoint(options.runs)
    )
    checkpoint = locate(named)
    model = load_checkpoint(checkpoint, drawing["weights"], device)
    assert model.card is not None
    num_classes = _check_draws_digits(model, checkpoint)
    settings = resolve_settings(
        model.card.sampling, None, {name: getattr(options, name) for name in _SETTINGS}
    )
    labels = labels_for(drawing["num"], num_classes)

    def get() -> tuple[Tensor, Tensor]:
        because = f" ({reason})" if reason else ""
        print(f"drawing {drawing['num']:,} images with {checkpoint}{because}", flush=True)
        batches = draw(SamplingEngine(model, settings), labels, seed=drawing["seed"], progress=True)
        return torch.cat([images for _, images in batches]), torch.tensor(labels)

    source: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "weights_checksum": weights_checksum(model),
        "deco_fast": __version__,
        **drawing,
        **asdict(settings),
        "guidance_interval": list(settings.guidance_interval),
    }
    name = f"{checkpoint_name(checkpoint)}-{settings.solver}{settings.steps}-seed{drawing['seed']}"
    return _Images(name, source, get)


def _check_draws_digits(model: DeCoNetwork, checkpoint: Path) -> int:
    """The number of the model's classes, which must be ten."""
    config, card = class_config(model.config, checkpoint), model.card
    assert card is not None
    if config.num_classes != 10 or config.in_channels != 3 or card.height != card.width:
        raise UserError(
            f"{checkpoint} draws {card.height}×{card.width} images of {config.num_classes} "
            "classes: name a checkpoint that was trained on the digits"
        )
    return config.num_classes


def _from_file(options: argparse.Namespace) -> _Images:
    """Images from an npz file as the sampling command writes it.

    Raises:
        UserError: it cannot be read or is not of this kind, or an option is for drawing.
    """
    for option in ("checkpoint", *_DRAWING_DEFAULTS, *_SETTINGS):
        if getattr(options, option) is not None:
            raise UserError(
                f"--{option.replace('_', '-')} is for drawing and --images are drawn already: "
                "leave one of them out"
            )
    path: Path = options.images
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["arr_0"]), torch.from_numpy(file["arr_1"])
    except FileNotFoundError:
        raise UserError(f"--images {path} does not exist: check the path") from None
    except READ_ERRORS as error:
        raise UserError(
            f"--images {path} is no npz file with images (arr_0) and labels (arr_1): "
            "have sample.py write one (--npz)"
        ) from error
    if images.ndim != 4:
        raise UserError(
            f"--images {path} has an arr_0 of shape {tuple(images.shape)} instead of "
            "(N, H, W, 3): have sample.py write one (--npz)"
        )
    source = {"images": str(path), "files": files_fingerprint(path)}
    return _Images(path.stem, source, lambda: (images, labels))


def add_parser(kinds: Any) -> None:
    """Add the command to the subparsers of `evaluate.py`."""
    digits = kinds.add_parser(
        "digits",
        help="are they digits, of the class asked for, and no copies?",
        description="Draw digits as sample.py does, or read drawn ones, and compare them with "
        "the classes asked for (by a classifier fitted on the training split) and with the "
        "training images nearest to them.",
    )
    images = digits.add_argument_group("images")
    images.add_argument(
        "--checkpoint",
        type=not_empty,
        metavar="PATH",
        help="as for sample.py (default: the newest run that has finished, else the checkpoint "
        "that ships with the package)",
    )
    images.add_argument(
        "--runs",
        type=to_path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where runs are looked for (default: %(default)s)",
    )
    images.add_argument(
        "--images",
        type=to_path,
        metavar="FILE",
        help="an npz file of sample.py --npz, instead of drawing",
    )
    images.add_argument("--weights", type=one_of(WEIGHTS), help="ema or model (default: ema)")
    images.add_argument("--num", type=whole_number(1), help="images (default: 1000)")
    images.add_argument("--seed", type=whole_number(0, 2**64 - 1), help="(default: 0)")
    settings = digits.add_argument_group("settings", "the checkpoint's where not given")
    settings.add_argument("--steps", type=whole_number(1), help="solver steps")
    settings.add_argument(
        "--solver", type=checked(check_solver), help="euler, heun, heun-pec or adams"
    )
    settings.add_argument(
        "--guidance-scale", type=number(), metavar="SCALE", help="1 is no guidance"
    )
    digits.add_argument(
        "--out",
        type=to_path,
        metavar="FOLDER",
        help="for the report and the picture (default: evaluations/digits-…)",
    )
    digits.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    digits.set_defaults(run=run)
