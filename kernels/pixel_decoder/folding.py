"""Parameters of the pixel decoder that fold into others, and the gradients on the way back.

The two input projections are one affine map of the pixel's colours and its position features, and
the features of a pixel's place are constants: h = rgb_weight · colours + table[place].

All here is float32 and tiny.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from deco_fast.kernels.pixel_decoder.reference import pixel_position_features

RGB = 3


@functools.lru_cache(maxsize=16)
def position_features(patch_size: int, device: torch.device, kind: str) -> Tensor:
    """The constant features, made once: on a GPU that takes longer than the rest of the folding.

    Raises:
        RuntimeError: the first call is recorded in a CUDA graph.
    """
    if device.type != "cuda":
        return _make_position_features(patch_size, device, kind)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call the pixel decoder once before you record it in a CUDA graph")
    # By another thread: what this one allocates in a first call under torch.compile's
    # "reduce-overhead" belongs to a graph, and may be there for that call alone.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_make_position_features, patch_size, device, kind).result()


def _make_position_features(patch_size: int, device: torch.device, kind: str) -> Tensor:
    with torch.inference_mode(False):
        features = pixel_position_features(patch_size, device, kind)
    if device.type == "cuda":
        # Whatever stream reads them first.
        torch.cuda.current_stream(device).synchronize()
    return features


def fold_input_projections(
    input_parameters: Sequence[Tensor], patch_size: int, position: str
) -> list[Tensor]:
    """rgb_weight (C, 3) and table (p², C), float32.

    Args:
        input_parameters: pixel_embedder_weight (C, 67), pixel_embedder_bias (C,),
            input_proj_weight (C, C), input_proj_bias (C,).
        patch_size: p.
        position: the kind of position features.
    """
    embedder_weight, embedder_bias, proj_weight, proj_bias = (t.float() for t in input_parameters)
    weight = proj_weight @ embedder_weight
    bias = torch.addmv(proj_bias, proj_weight, embedder_bias)
    places = position_features(patch_size, weight.device, position)
    return [weight[:, :RGB].contiguous(), torch.addmm(bias, places, weight[:, RGB:].T)]


def fold_input_projections_backward(
    grad_rgb_weight: Tensor,
    grad_table: Tensor,
    input_parameters: Sequence[Tensor],
    patch_size: int,
    position: str,
) -> list[Tensor]:
    """The gradients of the four, float32, from those of what `fold_input_projections` returns."""
    embedder_weight, embedder_bias, proj_weight, _ = (t.float() for t in input_parameters)
    places = position_features(patch_size, grad_table.device, position)
    grad_weight = torch.cat([grad_rgb_weight, grad_table.T @ places], dim=1)
    grad_bias = grad_table.sum(0)
    return [
        proj_weight.T @ grad_weight,
        proj_weight.T @ grad_bias,
        torch.addr(grad_weight @ embedder_weight.T, grad_bias, embedder_bias),
        grad_bias,
    ]
