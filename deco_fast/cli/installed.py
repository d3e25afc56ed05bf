"""The commands of an installed package, `deco-sample` beside `sample.py`, and what to call them.

Help and advice name a command as it was typed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from deco_fast.errors import run_script

_PREFIX = "deco-"


def train() -> NoReturn:
    """`deco-train`."""
    run_script("deco_fast.cli.train")


def sample() -> NoReturn:
    """`deco-sample`."""
    run_script("deco_fast.cli.sample")


def evaluate() -> NoReturn:
    """`deco-evaluate`."""
    run_script("deco_fast.cli.evaluate")


def app() -> NoReturn:
    """`deco-app`."""
    run_script("deco_fast.cli.app")


def command_name(command: str) -> str:
    """`sample.py`, or `deco-sample` where an installed command runs."""
    return _PREFIX + command if _is_installed() else f"{command}.py"


def command_words(command: str) -> list[str]:
    """What to type for it: `python sample.py`, or `deco-sample`."""
    name = command_name(command)
    return [name] if _is_installed() else ["python", name]


def script_path(command: str) -> str:
    """What to give torchrun for it."""
    name = command_name(command)
    return f"$(which {name})" if _is_installed() else name


def _is_installed() -> bool:
    return Path(sys.argv[0]).name.startswith(_PREFIX)
