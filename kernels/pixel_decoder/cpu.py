"""The pixel decoder on a CPU: the library's product, then csrc/pixel_decoder.cpp on its result.

The condition is kept as (p²·C, N), N the number of tokens: the kernel's vectors hold neighbouring
tokens at one place of their patches.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deco_fast import _C
from deco_fast.kernels.linear_upsample.cpu import matmul_nt
from deco_fast.kernels.pixel_decoder.folding import (
    fold_input_projections,
    fold_input_projections_backward,
)
from deco_fast.kernels.registration import condition_dtype

_INPUT_PROJECTIONS = 4  # tensors of `small` that fold into one affine map


def forward(
    x: Tensor,
    tokens: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
    position: str,
    keep_inputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `deco_fast.kernels.registration`."""
    dtype = condition_dtype(tokens)
    rows = tokens.flatten(0, 1).to(dtype)
    y = matmul_nt(upsample_weight.to(dtype), rows)
    weights = _kernel_weights(upsample_bias, small, patch_size, position)
    velocity = _C.pixel_decoder_forward(x.float().contiguous(), y, weights, patch_size)
    return velocity.to(tokens.dtype), y.view(-1), y.new_empty(0)


def backward(
    grad_velocity: Tensor,
    x: Tensor,
    tokens: Tensor,
    y: Tensor,
    block_inputs: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
    position: str,
    need_x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """See `deco_fast.kernels.registration`."""
    dtype = y.dtype
    rows = tokens.flatten(0, 1).to(dtype)
    grad_x, grad_y, (grad_rgb_weight, grad_table, grad_upsample_bias, *grad_rest) = (
        _C.pixel_decoder_backward(
            grad_velocity.float().contiguous(),
            x.float().contiguous(),
            y.view(upsample_bias.shape[0], rows.shape[0]),
            _kernel_weights(upsample_bias, small, patch_size, position),
            patch_size,
            need_x_grad,
        )
    )
    grad_tokens = matmul_nt(grad_y.T, upsample_weight.to(dtype).T)
    grad_upsample_weight = matmul_nt(grad_y, rows.T)
    grad_input = fold_input_projections_backward(
        grad_rgb_weight, grad_table, small[:_INPUT_PROJECTIONS], patch_size, position
    )
    # The kernel's gradients of the small tensors are pieces of one tensor: each becomes its own.
    grad_small = [
        grad.to(tensor.dtype, copy=True)
        for grad, tensor in zip([*grad_input, *grad_rest], small, strict=True)
    ]
    return (
        grad_x.to(x.dtype),
        grad_tokens.to(tokens.dtype).view(tokens.shape),
        grad_upsample_weight.to(upsample_weight.dtype),
        grad_upsample_bias.to(upsample_bias.dtype),
        grad_small,
    )


def _kernel_weights(
    upsample_bias: Tensor, small: Sequence[Tensor], patch_size: int, position: str
) -> list[Tensor]:
    input_projections, rest = small[:_INPUT_PROJECTIONS], small[_INPUT_PROJECTIONS:]
    return [
        *fold_input_projections(input_projections, patch_size, position),
        *(tensor.float().contiguous() for tensor in (upsample_bias, *rest)),
    ]
