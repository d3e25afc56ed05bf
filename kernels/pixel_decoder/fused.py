"""The pixel decoder by the fused op, for the backends `cpp` and `triton`."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from deco_fast.kernels.capability import is_foreign
from deco_fast.kernels.memory import keeps_block_inputs
from deco_fast.kernels.pixel_decoder import reference
from deco_fast.kernels.pixel_decoder.reference import PixelDecoderParameters
from deco_fast.kernels.registration import fused_ops, within_transform

CHANNELS = (16, 32, 64)
PATCH_SIZES = (1, 2, 4, 8, 16, 32)
MAX_BLOCKS = 6
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(x: Tensor, tokens: Tensor, parameters: PixelDecoderParameters, patch_size: int) -> bool:
    """Whether the fused kernels are made for this problem."""
    rows = patch_size**2 * parameters.output_weight.shape[1]
    return (
        parameters.output_weight.shape[0] == x.shape[1] == 3
        and parameters.output_weight.shape[1] in CHANNELS
        and parameters.upsample_weight.shape == (rows, tokens.shape[-1])
        and parameters.upsample_bias.shape == (rows,)
        and patch_size in PATCH_SIZES
        and 1 <= len(parameters.blocks) <= MAX_BLOCKS
        and x.dtype in _DTYPES
        and tokens.dtype in _DTYPES
    )


def _exceeds_shared_memory(tokens: Tensor, parameters: PixelDecoderParameters) -> bool:
    """64 channels in float32 need more than the 99 KiB of, say, a GeForce RTX."""
    if not tokens.is_cuda or tokens.dtype != torch.float32:
        return False
    if parameters.output_weight.shape[1] < 64:
        return False
    from deco_fast.kernels.pixel_decoder.gpu_tiles import fits_shared_memory

    major, minor = torch.cuda.get_device_capability(tokens.device)
    return not fits_shared_memory(64, torch.float32, 10 * major + minor)


def _saves_no_time(tokens: Tensor) -> bool:
    """Training in float32 on a GPU, unless the kernels were asked for by name."""
    if not tokens.is_cuda or tokens.dtype != torch.float32:
        return False
    from deco_fast.kernels.registry import is_forced  # which imports this module

    return not is_forced()


def pixel_decoder(
    x: Tensor,
    tokens: Tensor,
    parameters: PixelDecoderParameters,
    patch_size: int,
    position: str = "product",
) -> Tensor:
    """See `deco_fast.ops.pixel_decoder`.

    Left to the reference: parameters that do not match, which it refuses, sizes and dtypes that the
    kernels are not made for (`fits`), 64 channels in float32 on GPUs with little shared memory,
    training in float32 on a GPU (where the Triton kernels save memory and no time) unless a
    backend is forced, GPUs that are `is_foreign`, and all inside of `torch.func` transforms.

    The computation is in the dtype of the tokens, under autocast in that of autocast, and so is
    the velocity. The parameters stay as they are, so that no converted copy of them waits for the
    backward pass.
    """
    foreign = is_foreign(tokens)
    if foreign or within_transform() or not fits(x, tokens, parameters, patch_size):
        return reference.pixel_decoder(x, tokens, parameters, patch_size, position)
    device_type = tokens.device.type
    if torch.is_autocast_enabled(device_type):
        tokens = tokens.to(torch.get_autocast_dtype(device_type))
    if _exceeds_shared_memory(tokens, parameters):
        return reference.pixel_decoder(x, tokens, parameters, patch_size, position)
    p = parameters
    small = [
        *(p.pixel_embedder_weight, p.pixel_embedder_bias, p.input_proj_weight, p.input_proj_bias),
        *chain.from_iterable(p.blocks),
        *(p.output_weight, p.output_bias),
    ]
    trained = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, tokens, p.upsample_weight, p.upsample_bias, *small)
    )
    if trained and _saves_no_time(tokens):
        return reference.pixel_decoder(x, tokens, parameters, patch_size, position)
    velocity, _, _ = fused_ops.pixel_decoder(
        *(x, tokens, p.upsample_weight, p.upsample_bias, small, patch_size),
        *(position, trained, trained and keeps_block_inputs()),
    )
    return velocity
