"""The pixel decoder: from the noisy image and the DiT's tokens to the velocity.

For each pixel i of each patch, with its RGB values x_i, the position features f_i of its
place inside the patch and its own condition y_i = upsample(token)_i (specification B.5):

    h = input_proj(pixel_embedder([x_i, f_i]))
    for each block:   shift, scale, gate = modulation(silu(y_i))
                      z = layer_norm(h) · (1 + scale) + shift
                      h = h + gate · fc2(silu(fc1(z)))
    velocity_i = output(layer_norm(h))
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_fast.kernels.layout import from_pixels, to_pixels
from deco_fast.kernels.linear_upsample.reference import linear_upsample

NORM_EPS = 1e-6
NUM_FREQUENCIES = 8
"""Cosine frequencies per axis of the class model."""

POSITION_FEATURES = NUM_FREQUENCIES**2
"""Position features of a pixel, in either model."""

PositionKind = Literal["product", "axial"]
"""How a pixel's place becomes features: the class model's way, and the text model's."""


class BlockParameters(NamedTuple):
    """One AdaLN-Zero block over C channels."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    modulation_weight: Tensor  # (3C, C): shift, scale, gate
    modulation_bias: Tensor  # (3C,)
    fc1_weight: Tensor  # (C, C)
    fc1_bias: Tensor  # (C,)
    fc2_weight: Tensor  # (C, C)
    fc2_bias: Tensor  # (C,)


class PixelDecoderParameters(NamedTuple):
    """All weights of the pixel decoder: D the DiT's width, C the decoder's, p the patch size."""

    upsample_weight: Tensor  # (p²·C, D)
    upsample_bias: Tensor  # (p²·C,)
    pixel_embedder_weight: Tensor  # (C, 3 + 64)
    pixel_embedder_bias: Tensor  # (C,)
    input_proj_weight: Tensor  # (C, C)
    input_proj_bias: Tensor  # (C,)
    blocks: tuple[BlockParameters, ...]
    output_weight: Tensor  # (3, C)
    output_bias: Tensor  # (3,)


def pixel_position_features(
    patch_size: int, device: torch.device | None = None, kind: str = "product"
) -> Tensor:
    """Cosine features of a pixel's place inside its patch, (p², 64), float32 (B.5).

    "product": feature[8i + j] = cos(π·px·f_i) · cos(π·py·f_j) / (1 + f_i·f_j), with px, py in
    [0, 1] and f_k = 8k/7.

    "axial": feature[2k] = cos(px·w_k) and feature[2k + 1] = cos(py·w_k), with px, py in [0, p]
    and w_k = 10000^(−k/32): the cosines of a rotary table, without its sines.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "product":
        return _product_features(patch_size, device)
    if kind == "axial":
        return _axial_features(patch_size, device)
    raise ValueError(f"unknown position features '{kind}': choose product or axial")


def _product_features(patch_size: int, device: torch.device | None) -> Tensor:
    linspace = functools.partial(torch.linspace, device=device, dtype=torch.float32)
    place = linspace(0, 1, patch_size)
    frequency = linspace(0, NUM_FREQUENCIES, NUM_FREQUENCIES)
    cosine_PF = torch.cos(math.pi * place[:, None] * frequency)
    damping_FF = 1 / (1 + frequency[:, None] * frequency)
    features = cosine_PF[None, :, :, None] * cosine_PF[:, None, None, :] * damping_FF
    return features.reshape(patch_size**2, POSITION_FEATURES)


def _axial_features(patch_size: int, device: torch.device | None) -> Tensor:
    place = torch.linspace(0, patch_size, patch_size, device=device, dtype=torch.float32)
    exponent = torch.arange(POSITION_FEATURES // 2, device=device).to(place)
    exponent = exponent / (POSITION_FEATURES // 2)
    cosine_PK = torch.cos(place[:, None] * 10000.0**-exponent)
    of_x = cosine_PK[None, :].expand(patch_size, -1, -1)
    of_y = cosine_PK[:, None].expand(-1, patch_size, -1)
    return torch.stack([of_x, of_y], dim=-1).reshape(patch_size**2, POSITION_FEATURES)


def pixel_features(x: Tensor, patch_size: int, kind: str = "product") -> Tensor:
    """Image (B, C, H, W) to its pixels with the features of their places, (B·L, p², C + 64)."""
    pixels = to_pixels(x, patch_size)
    places = pixel_position_features(patch_size, x.device, kind).to(x.dtype)
    return torch.cat([pixels, places.expand(len(pixels), -1, -1)], dim=-1)


def pixel_decoder(
    x: Tensor,
    tokens: Tensor,
    parameters: PixelDecoderParameters,
    patch_size: int,
    position: str = "product",
) -> Tensor:
    """Decode the noisy image x (B, 3, H, W) under tokens (B, L, D) to the velocity (B, 3, H, W)."""
    p = parameters
    y = linear_upsample(tokens, p.upsample_weight, p.upsample_bias, patch_size)
    features = pixel_features(x, patch_size, position)
    h = F.linear(features, p.pixel_embedder_weight, p.pixel_embedder_bias)
    h = F.linear(h, p.input_proj_weight, p.input_proj_bias)
    condition = F.silu(y)
    for block in p.blocks:
        h = _block(h, condition, block)
    h = F.layer_norm(h, h.shape[-1:], eps=NORM_EPS)
    velocity = F.linear(h, p.output_weight, p.output_bias)
    return from_pixels(velocity, x.shape[-2], x.shape[-1], patch_size)


def _block(h: Tensor, condition: Tensor, p: BlockParameters) -> Tensor:
    shift, scale, gate = F.linear(condition, p.modulation_weight, p.modulation_bias).chunk(3, -1)
    z = F.layer_norm(h, h.shape[-1:], p.norm_weight, p.norm_bias, NORM_EPS) * (1 + scale) + shift
    z = F.linear(F.silu(F.linear(z, p.fc1_weight, p.fc1_bias)), p.fc2_weight, p.fc2_bias)
    return h + gate * z
