"""What the pixel decoder keeps for its backward pass on a GPU: memory for time.

Of three blocks' decoder eager PyTorch keeps 2.5 KB per pixel in half precision. The Triton kernels
keep 64 bytes of condition and, by default, 128 bytes of block inputs; without these they are lean,
and the backward pass computes the blocks' inputs again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from deco_fast.errors import UserError

_VARIABLE = "DECO_KEEP_BLOCK_INPUTS"

# A plain global: torch.compile guards on it and compiles anew when it changes.
_keep = os.environ.get(_VARIABLE, "1")


def keeps_block_inputs() -> bool:
    """Whether a forward pass that will be differentiated keeps the blocks' inputs.

    Raises:
        UserError: the environment variable DECO_KEEP_BLOCK_INPUTS is neither 0 nor 1.
    """
    if _keep not in ("0", "1"):
        raise UserError(f"{_VARIABLE}={_keep}: set 1 (faster, the default) or 0 (less memory)")
    return _keep == "1"


@contextmanager
def keep_block_inputs(keep: bool) -> Iterator[None]:
    """Decide, for forward passes inside the `with` block and in all threads, whether the Triton
    pixel decoder keeps its blocks' inputs for the backward pass.

    By default, and if the environment variable DECO_KEEP_BLOCK_INPUTS is 1, it does. Other backends
    never do.

    Args:
        keep: True is faster; False is lean, about 3% of eager PyTorch's memory instead of 8%.
    """
    global _keep
    previous, _keep = _keep, "1" if keep else "0"
    try:
        yield
    finally:
        _keep = previous
