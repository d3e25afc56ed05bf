"""torch.compile needs a compiler at run time; without one the user gets a line, not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import BackendCompilerFailed

from deco_fast.errors import UserError


@contextmanager
def explain_compile_errors(remedy: str) -> Iterator[None]:
    """Turn a failure of torch.compile's back end inside the block into a `UserError`.

    Args:
        remedy: how to do without torch.compile, for the end of the message.
    """
    try:
        yield
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).strip().splitlines()[0]
        raise UserError(
            f"torch.compile cannot compile here ({reason}): install a C++ compiler, or {remedy}"
        ) from error
