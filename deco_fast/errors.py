"""Errors that a user can act on, and how a command reports them."""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn, ParamSpec

from deco_fast.output import OutputError, enduring_output

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


def is_out_of_memory(error: BaseException) -> bool:
    """By what torch calls it: its module need not be imported, and on a CPU it has no class."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def report(error: BaseException) -> int:
    """Tell of what ends a command, on stderr, and return the status that it ends with.

    A `UserError`, and too little memory, is the line `error: …` and status 2, which is also what
    argparse gives for a wrong option; an interrupt is 130 (128 + SIGINT). Any other exception is a
    fault of ours: its traceback, and 1.
    """
    if isinstance(error, SystemExit):
        # argparse leaves this way: 2 after a wrong option, 0 after --help.
        if not isinstance(error.code, str):
            return error.code or 0
        error = UserError(error.code)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if is_out_of_memory(error):
        reason = str(error).strip().partition("\n")[0]
        error = UserError(f"out of memory ({reason}): choose smaller batches or images")
    if isinstance(error, UserError):
        # A message that quotes a library's own may carry its line breaks.
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def run_command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate a command's `main` so that it returns an exit status and never a traceback.

    `report` says what becomes of a `UserError` and of an interrupt. Any other exception is a fault
    of ours and is raised. Output that cannot be written ends no command (`deco_fast.output`). The
    console scripts and the scripts at the root pass the returned status to `sys.exit`.

    Example::

        @run_command
        def main(argv: list[str] | None = None) -> int: ...
    """

    @functools.wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> int:
        status = 0
        try:
            with enduring_output():
                status = _status(main, *args, **kwargs)
        except OutputError as error:
            reason = f"the output could not be written ({error.strerror}): free some space"
            with suppress(OSError):  # stderr may be on the same disk
                return status or report(UserError(reason))
            return 2
        return status

    return command


def _status(main: Callable[P, int | None], *args: P.args, **kwargs: P.kwargs) -> int:
    try:
        return main(*args, **kwargs) or 0
    except (UserError, KeyboardInterrupt, SystemExit) as error:
        return report(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return report(error)


def run_script(module: str) -> NoReturn:
    """Import a command's module, call its `main`, and end the process with its status.

    What a script at the root does: importing takes seconds, and an interrupt in them, or a package
    that is not there, is told as any other.
    """
    try:
        main = importlib.import_module(module).main
    except KeyboardInterrupt as error:
        sys.exit(report(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("deco_fast"):
            raise
        message = f"the package {error.name} is not installed: run make sample, or pip install -e ."
        sys.exit(report(UserError(message)))
    sys.exit(main())
