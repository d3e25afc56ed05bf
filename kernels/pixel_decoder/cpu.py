"""The pixel decoder on a CPU: a large product, then csrc/pixel_decoder.cpp on its result.

The condition is made as (p²·C, N), N the number of tokens: the kernel's vectors hold neighbouring
tokens at one place of their patches. It is the largest tensor by far, and only for the backward
pass all of it is kept: otherwise, and of its gradient, only the part of some pixels of each patch
exists at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deco_fast import _C
from deco_fast.kernels.matmul.cpu import matmul
from deco_fast.kernels.pixel_decoder.folding import (
    fold_input_projections,
    fold_input_projections_backward,
)
from deco_fast.kernels.registration import condition_dtype

_INPUT_PROJECTIONS = 4  # tensors of `small` that fold into one affine map

_SHARE_BYTES = 8 * 2**20
"""Of the condition at a time: with a quarter of it MKL's products are a tenth slower, and twice as
much gains nothing."""


def forward(
    x: Tensor,
    tokens: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
    position: str,
    keep_y: bool,
    keep_inputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `deco_fast.kernels.registration`."""
    dtype = condition_dtype(tokens)
    rows = tokens.flatten(0, 1).to(dtype)
    weight = upsample_weight.to(dtype)
    weights = _kernel_weights(upsample_bias, small, patch_size, position)
    x = x.float().contiguous()
    velocity = torch.empty_like(x)
    shares = _shares(rows, weight, patch_size)
    # The first share is the largest.
    y = rows.new_empty(len(weight if keep_y else weight[shares[0][1]]), rows.shape[0])
    for first_pixel, channels in shares:
        part = y[channels] if keep_y else y[: len(weight[channels])]
        matmul(weight[channels], rows.T, part)
        _C.pixel_decoder_forward(x, part, weights, patch_size, first_pixel, velocity)
    return velocity.to(tokens.dtype), y.view(-1) if keep_y else y.new_empty(0), y.new_empty(0)


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
    weight = upsample_weight.to(dtype)
    weights = _kernel_weights(upsample_bias, small, patch_size, position)
    x32, grad_velocity = x.float().contiguous(), grad_velocity.float().contiguous()
    y = y.view(weight.shape[0], rows.shape[0])
    grad_x = torch.empty_like(x32) if need_x_grad else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_tokens = torch.zeros(rows.shape, dtype=torch.float32)  # a sum over the shares
    grad_tables, grad_biases, sums = [], [], list[Tensor]()
    shares = _shares(rows, weight, patch_size)
    scratch = torch.empty_like(y[shares[0][1]])
    for first_pixel, channels in shares:
        grad_y = scratch[: len(weight[channels])]
        grad_rgb_weight, grad_table, grad_bias, *grad_rest = _C.pixel_decoder_backward(
            *(grad_velocity, x32, y[channels], weights, patch_size, first_pixel, grad_y, grad_x)
        )
        grad_tables.append(grad_table)
        grad_biases.append(grad_bias)
        parts = [grad_rgb_weight, *grad_rest]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        matmul(grad_y.T, weight[channels], grad_tokens, add=True)
        matmul(grad_y, rows, grad_weight[channels])
    grad_rgb_weight, *grad_rest = sums
    grad_input = fold_input_projections_backward(
        *(grad_rgb_weight, torch.cat(grad_tables), small[:_INPUT_PROJECTIONS]),
        *(patch_size, position),
    )
    # The kernel's gradients of the small tensors are pieces of one tensor: each becomes its own.
    grad_small = [
        grad.to(tensor.dtype, copy=True)
        for grad, tensor in zip([*grad_input, *grad_rest], small, strict=True)
    ]
    return (
        x.new_empty(0) if grad_x is None else grad_x.to(x.dtype),
        grad_tokens.to(tokens.dtype).view(tokens.shape),
        grad_weight.to(upsample_weight.dtype),
        torch.cat(grad_biases).to(upsample_bias.dtype),
        grad_small,
    )


def _shares(rows: Tensor, weight: Tensor, patch_size: int) -> list[tuple[int, slice]]:
    """Of the pixels of each patch to take at a time: the first, and their channels in y."""
    area = patch_size**2
    channels = weight.shape[0] // area
    pixel_bytes = max(1, channels * rows.shape[0] * rows.element_size())
    count = max(1, _SHARE_BYTES // pixel_bytes)
    return [
        (first, slice(first * channels, min(first + count, area) * channels))
        for first in range(0, area, count)
    ]


def _kernel_weights(
    upsample_bias: Tensor, small: Sequence[Tensor], patch_size: int, position: str
) -> list[Tensor]:
    input_projections, rest = small[:_INPUT_PROJECTIONS], small[_INPUT_PROJECTIONS:]
    return [
        *fold_input_projections(input_projections, patch_size, position),
        *(tensor.float().contiguous() for tensor in (upsample_bias, *rest)),
    ]
