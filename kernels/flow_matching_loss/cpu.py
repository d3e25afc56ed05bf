"""The training loss on a CPU: host function of csrc/flow_matching_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from deco_fast import _C


def forward(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float,
    timestep_weight: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `deco_fast.kernels.registration`."""
    return _C.flow_matching_loss_forward(
        _readable(prediction),
        _readable(target),
        table.float().contiguous(),
        weight,
        None if timestep_weight is None else timestep_weight.float().contiguous(),
        with_gradient,
    )


def _readable(image: Tensor) -> Tensor:
    # Converting float16 is the compiler's business and not every compiler's.
    return (image.float() if image.dtype == torch.float16 else image).contiguous()
