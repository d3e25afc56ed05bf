"""The training loss on a CPU: host function of csrc/flow_matching_loss.cpp."""

from __future__ import annotations

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
        prediction, target, table, weight, timestep_weight, with_gradient
    )


def differentiable(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float,
    timestep_weight: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op with autograd, both in C++."""
    return _C.flow_matching_loss(prediction, target, table, weight, timestep_weight, with_gradient)
