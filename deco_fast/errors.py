"""Errors that a user can act on, and how a command reports them."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the thing and the remedy: a command prints it as it stands.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest choice, or all of them."""
    options = [str(choice) for choice in choices]
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose {', '.join(sorted(options))}"


def run_command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate a command's `main` so that it returns an exit status and never a traceback.

    A `UserError` becomes the line `error: …` on stderr and status 2, which is also what
    argparse gives for a wrong option; an interrupt becomes status 130 (128 + SIGINT). Any other
    exception is a fault of ours and keeps its traceback. The console scripts and the scripts at
    the root pass the returned status to `sys.exit`.

    Example::

        @run_command
        def main(argv: list[str] | None = None) -> int: ...
    """

    @functools.wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            # A message that quotes a library's own may carry its line breaks.
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except SystemExit as stop:
            # argparse leaves this way: 2 after a wrong option, 0 after --help.
            if isinstance(stop.code, str):
                print("error:", stop.code, file=sys.stderr)
                return 2
            return stop.code or 0

    return command
