"""torch.compile for the commands: a cache that lasts, and a line where there is no compiler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deco_fast.errors import UserError


def keep_compiled_code() -> None:
    """Have torch.compile keep what it makes in the user's cache folder, for the next process.

    Torch's own place for it is the folder for temporary files, which does not outlive a restart of
    the machine, or of the container. TORCHINDUCTOR_CACHE_DIR, where it is set, stays as it is.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(base) / "deco_fast" / "inductor"))


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
