"""Which checkpoint to draw with where none is named, and what to call it."""

from __future__ import annotations

import re
from pathlib import Path

from deco_fast.checkpoint import newest_checkpoint
from deco_fast.errors import UserError
from deco_fast.resources import pretrained_folder

SHIPPED = "deco-digits"
"""The checkpoint that is part of the package."""


def newest_finished_run(runs: Path) -> Path | None:
    """The run folder in `runs` whose training finished last, by the time of its mark."""
    marks = [mark for mark in runs.glob("*/finished") if newest_checkpoint(mark.parent)]
    return max(marks, key=lambda mark: mark.stat().st_mtime_ns).parent if marks else None


def default_checkpoint(runs: Path) -> tuple[Path, str]:
    """The checkpoint that is meant where none is named, and why it is this one.

    Raises:
        UserError: no run has finished and none ships with the package.
    """
    run = newest_finished_run(runs)
    if run is not None:
        return run, "the newest run that has finished"
    return shipped_checkpoint(), f"ships with the package; no run in {runs} has finished"


def shipped_checkpoint() -> Path:
    """The checkpoint that is part of the package.

    Raises:
        UserError: this package has none.
    """
    shipped = pretrained_folder() / SHIPPED
    if not shipped.exists():
        raise UserError(
            "this package ships no checkpoint: train one (train.py) or name one (--checkpoint)"
        )
    return shipped


def checkpoint_name(path: Path) -> str:
    """A name for files and folders: of the run and its step, or of the checkpoint itself."""
    if path.suffix == ".safetensors" and path.stem in ("ema", "model"):
        path = path.parent
    if re.fullmatch(r"step-\d+", path.name) and path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.name}"
    return path.stem if path.suffix in (".safetensors", ".ckpt", ".pt") else path.name
