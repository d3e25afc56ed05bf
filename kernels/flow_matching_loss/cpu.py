"""The training loss on a CPU: csrc/flow_matching_loss_op.h says what the functions take.

`forward` is the host function of the op (see `deco_fast.kernels.registration`), `differentiable`
the op with autograd, both in C++.
"""

from deco_fast._C import flow_matching_loss as differentiable
from deco_fast._C import flow_matching_loss_forward as forward

__all__ = ["differentiable", "forward"]
