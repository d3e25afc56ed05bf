"""Where the files that ship with the package lie."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def config_folder() -> Path:
    """The folder of the shipped run configurations (`*.yaml`).

    They are `deco_fast/configs` in an installed package and `configs` beside the package in a
    checkout.
    """
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def pretrained_folder() -> Path:
    """The folder of the shipped checkpoints, one folder each."""
    return _PACKAGE / "pretrained"
