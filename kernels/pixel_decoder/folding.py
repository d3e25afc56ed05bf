"""Parameters of the pixel decoder that fold into others, and the gradients on the way back.

The two input projections are one affine map of the pixel's colours and its position features, and
the features of a pixel's place are constants: h = rgb_weight · colours + table[place].

A block's LayerNorm weights g and b fold into its modulation, whose two affine maps are then

    z = n · scale(c) + shift(c)    scale = g ∘ (1 + W_s c + b_s)
                                   shift = b ∘ (1 + W_s c + b_s) + W_t c + b_t

All here is float32 and tiny.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from deco_fast.kernels.pixel_decoder.reference import pixel_position_features

RGB = 3


@functools.lru_cache(maxsize=16)
def _position(patch_size: int, device: torch.device) -> Tensor:
    """The constant features, made once: on a GPU that takes longer than the rest of the folding."""
    with torch.inference_mode(False):
        return pixel_position_features(patch_size, device)


def fold_input_projections(input_parameters: Sequence[Tensor], patch_size: int) -> list[Tensor]:
    """rgb_weight (C, 3) and table (p², C), float32.

    Args:
        input_parameters: pixel_embedder_weight (C, 67), pixel_embedder_bias (C,),
            input_proj_weight (C, C), input_proj_bias (C,).
        patch_size: p.
    """
    embedder_weight, embedder_bias, proj_weight, proj_bias = (t.float() for t in input_parameters)
    weight = proj_weight @ embedder_weight
    bias = torch.addmv(proj_bias, proj_weight, embedder_bias)
    position = _position(patch_size, weight.device)
    return [weight[:, :RGB].contiguous(), torch.addmm(bias, position, weight[:, RGB:].T)]


def fold_input_projections_backward(
    grad_rgb_weight: Tensor,
    grad_table: Tensor,
    input_parameters: Sequence[Tensor],
    patch_size: int,
) -> list[Tensor]:
    """The gradients of the four, float32, from those of what `fold_input_projections` returns."""
    embedder_weight, embedder_bias, proj_weight, _ = (t.float() for t in input_parameters)
    position = _position(patch_size, grad_table.device)
    grad_weight = torch.cat([grad_rgb_weight, grad_table.T @ position], dim=1)
    grad_bias = grad_table.sum(0)
    return [
        proj_weight.T @ grad_weight,
        proj_weight.T @ grad_bias,
        torch.addr(grad_weight @ embedder_weight.T, grad_bias, embedder_bias),
        grad_bias,
    ]


def fold_blocks(block_parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Matrices (blocks, 5, C, C), (out, in), and vectors (blocks, 5, C), float32.

    The five are scale, shift, gate, fc1, fc2, the first three to be applied to c = silu(y).

    Args:
        block_parameters: the eight tensors of each block in the order of `BlockParameters`.
    """
    channels = block_parameters[0].shape[0]
    matrices, vectors = [], []
    for parameters in _by_block(block_parameters):
        norm_weight, norm_bias, weight, bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (
            parameters
        )
        shift_weight, scale_weight, gate_weight = weight.split(channels)
        shift_bias, scale_bias, gate_bias = bias.split(channels)
        matrices += [
            norm_weight[:, None] * scale_weight,
            torch.addcmul(shift_weight, norm_bias[:, None], scale_weight),
            *(gate_weight, fc1_weight, fc2_weight),
        ]
        vectors += [
            torch.addcmul(norm_weight, norm_weight, scale_bias),
            torch.addcmul(shift_bias + norm_bias, norm_bias, scale_bias),
            *(gate_bias, fc1_bias, fc2_bias),
        ]
    return (
        torch.stack(matrices).unflatten(0, (-1, 5)),
        torch.stack(vectors).unflatten(0, (-1, 5)),
    )


def fold_blocks_backward(
    grad_matrices: Tensor, grad_vectors: Tensor, block_parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of `block_parameters`, float32, from those of what `fold_blocks` returns."""
    channels = grad_vectors.shape[-1]
    grads = []
    for block, parameters in enumerate(_by_block(block_parameters)):
        norm_weight, norm_bias, weight, bias, *_ = parameters
        scale_weight, scale_bias = weight.split(channels)[1], bias.split(channels)[1]
        grad_scale, grad_shift, grad_gate, grad_fc1, grad_fc2 = grad_matrices[block]
        bias_scale, bias_shift, bias_gate, bias_fc1, bias_fc2 = grad_vectors[block]
        grads += [
            torch.addcmul((grad_scale * scale_weight).sum(1) + bias_scale, bias_scale, scale_bias),
            torch.addcmul((grad_shift * scale_weight).sum(1) + bias_shift, bias_shift, scale_bias),
            torch.cat(
                [
                    grad_shift,
                    norm_weight[:, None] * grad_scale + norm_bias[:, None] * grad_shift,
                    grad_gate,
                ]
            ),
            torch.cat([bias_shift, norm_weight * bias_scale + norm_bias * bias_shift, bias_gate]),
            *(grad_fc1, bias_fc1, grad_fc2, bias_fc2),
        ]
    return grads


def _by_block(block_parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    floats = [t.float() for t in block_parameters]
    return [floats[start : start + 8] for start in range(0, len(floats), 8)]
