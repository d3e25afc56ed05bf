"""The training loss by the fused op, for the backends `cpp` and `triton`.

One pass reads prediction and target once and writes the gradient of the total beside the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deco_fast.kernels import registration
from deco_fast.kernels.capability import is_foreign
from deco_fast.kernels.flow_matching_loss import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flow_matching_loss(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float | Tensor,
    timestep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `deco_fast.ops.flow_matching_loss`.

    Differentiable with respect to prediction and target. Left to the reference: float64, a weight
    that is a tensor, a table or timestep weights that want a gradient, a target that wants a finer
    one than a bf16 prediction keeps, GPUs that are `is_foreign`, and all inside of `torch.func`
    transforms.
    """
    learned = table.requires_grad
    learned |= timestep_weight is not None and timestep_weight.requires_grad
    coarse = target.requires_grad and target.dtype != torch.bfloat16
    coarse &= registration.loss_gradient_dtype(prediction) == torch.bfloat16
    known = prediction.dtype in _DTYPES and target.dtype in _DTYPES
    foreign = is_foreign(prediction)
    by_reference = foreign or learned or coarse or not known or registration.within_transform()
    if by_reference or isinstance(weight, Tensor):
        return reference.flow_matching_loss(prediction, target, table, weight, timestep_weight)
    with_gradient = torch.is_grad_enabled() and (prediction.requires_grad or target.requires_grad)
    total, flow_matching, frequency, _ = registration.flow_matching_loss(
        prediction, target, table, weight, timestep_weight, with_gradient
    )
    return total, flow_matching, frequency
