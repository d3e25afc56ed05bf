"""Patch layouts of an image (specification B.1): the DiT's view, and the pixel decoder's.

Both cut the image into non-overlapping p×p patches, row by row; L = (H/p)·(W/p).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Image (B, C, H, W) to the DiT's tokens (B, L, C·p²), channel-major inside a token."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """The inverse of `patchify`: (B, L, C·p²) to (B, C, H, W)."""
    return rearrange(
        tokens,
        "b (h w) (c p q) -> b c (h p) (w q)",
        h=height // patch_size,
        w=width // patch_size,
        p=patch_size,
        q=patch_size,
    )


def to_pixels(x: Tensor, patch_size: int) -> Tensor:
    """Image (B, C, H, W) to the decoder's rows of pixels (B·L, p², C), channels last."""
    return rearrange(x, "b c (h p) (w q) -> (b h w) (p q) c", p=patch_size, q=patch_size)


def from_pixels(pixels: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """The inverse of `to_pixels`: (B·L, p², C) to (B, C, H, W).

    A permutation and not `F.fold`: Inductor's vectorised CPU code for the fused fold is
    wrong in torch 2.13 (specification D0).
    """
    return rearrange(
        pixels,
        "(b h w) (p q) c -> b c (h p) (w q)",
        h=height // patch_size,
        w=width // patch_size,
        p=patch_size,
        q=patch_size,
    )
