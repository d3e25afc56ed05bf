"""What the commands' options have in common: one-line errors, typed values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deco_fast.errors import UserError, nearest


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and name the nearest option.

    `parse_args` raises `UserError`, which `run_command` prints.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """As argparse's.

        Raises:
            UserError: an option or its value is wrong.
        """
        options, rest = self.parse_known_args(args)
        if rest:
            self.error(f"unknown option '{rest[0]}'{nearest(rest[0], self._options(options))}")
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _options(self, given: argparse.Namespace) -> list[str]:
        """Its own, and those of the command that was given."""
        names: list[str] = []
        for action in self._actions:
            names += [option for option in action.option_strings if option.startswith("--")]
            if isinstance(action.choices, Mapping):
                command = action.choices.get(getattr(given, action.dest, None))
                names += command._options(given) if isinstance(command, CommandParser) else []
        return names


def to_path(text: str) -> Path:
    """For `type=`: a path, which is not empty, as a variable that is not set would have it.

    A shell leaves the ~ of `--out=~/runs` to us.
    """
    return Path(not_empty(text)).expanduser()


def not_empty(text: str) -> str:
    """For `type=`: a path, or a name that stands for one, as it was written."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a path")
    return text


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """For `type=`: an integer of at least `low` and at most `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not '{text}'") from None
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"{low} … {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {value}")
        return value

    return parse


def number(
    low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> Callable[[str], float]:
    """For `type=`: a finite number of at least `low` (above it with `open_low`), up to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not '{text}'") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        if not low <= value <= high or (open_low and value == low):
            relation = "above" if open_low else "at least"
            bounds = f"{relation} {low:g}" if math.isinf(high) else f"{low:g} … {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    return parse


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """For `type=`: a text that `check` takes without a ValueError."""

    def parse(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """For `type=`: one of the choices; the nearest is named after another."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"unknown '{text}'{nearest(text, choices)}")
        return text

    return parse
