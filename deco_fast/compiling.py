"""torch.compile as we use it: caches that last and are apart, a line where there is no compiler."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar, cast

from deco_fast.errors import UserError

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_T = TypeVar("_T")


def keep_compiled_code() -> None:
    """Have torch.compile keep what it makes in the user's cache folder, for the next process.

    Torch's own place for it is the folder for temporary files, which does not outlive a restart of
    the machine, or of the container; it remains where the user has no such folder.
    TORCHINDUCTOR_CACHE_DIR, where it is set, stays as it is.

    Raises:
        UserError: TORCHINDUCTOR_CACHE_DIR is no folder and cannot be made.
    """
    if chosen := os.environ.get(_CACHE):
        try:
            Path(chosen).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{_CACHE} {chosen} cannot be made ({error.strerror}): set it to another folder"
            ) from error
        return
    with suppress(OSError, RuntimeError):  # no home
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "deco_fast" / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[_CACHE] = str(folder)


@contextmanager
def explain_compile_errors(remedy: str) -> Iterator[None]:
    """Turn a failure of torch.compile's back end inside the block into a `UserError`.

    Args:
        remedy: how to do without torch.compile, for the end of the message.
    """
    try:
        yield
    except RuntimeError as error:
        # Not at the top: a command that compiles nothing starts without torch's compiler.
        from torch._dynamo.exc import BackendCompilerFailed

        if not isinstance(error, BackendCompilerFailed):
            raise
        reason = str(error.inner_exception).strip().splitlines()[0]
        raise UserError(
            f"torch.compile cannot compile here ({reason}): install a C++ compiler, or {remedy}"
        ) from error


def compile_apart(function: Callable[..., _T]) -> Callable[..., _T]:
    """`torch.compile(function, fullgraph=True, dynamic=False)` with a cache of its own.

    torch counts compilations by Python code, and gives up at the eighth of the same: a fifth engine
    in a process, with its two graphs, would fail. So each gets a copy of the code, with which also
    goes what was compiled of it.

    Args:
        function: a Python function; of a method the function that it is in its class.
    """
    import torch  # whose compiler this brings along

    plain = cast(types.FunctionType, function)
    copy = types.FunctionType(
        plain.__code__.replace(),
        *(plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__),
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    return torch.compile(cast(Callable[..., _T], copy), fullgraph=True, dynamic=False)
