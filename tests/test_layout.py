"""Patch layouts: which pixel goes where (specification B.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden import tensors
from hypothesis import given
from hypothesis import strategies as st

from deco_fast.kernels.layout import from_pixels, patchify, to_pixels

shapes = st.tuples(
    st.integers(1, 3),  # batch
    st.integers(1, 4),  # channels
    st.integers(1, 4),  # rows of patches
    st.integers(1, 4),  # columns of patches
    st.sampled_from([1, 2, 3, 8]),  # patch size
)


def numbered(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """An image in which no two values are the same."""
    count = batch * channels * height * width
    return torch.arange(count, dtype=torch.float32).view(batch, channels, height, width)


def test_golden_layouts() -> None:
    golden = tensors("layout_unfold_p4")
    assert torch.equal(patchify(golden["x"], 4), golden["tokens_LxCpp"])
    assert torch.equal(to_pixels(golden["x"], 4), golden["pixels_BLxPPxC"])
    height, width = golden["x"].shape[-2:]
    assert torch.equal(from_pixels(golden["pixels_BLxPPxC"], height, width, 4), golden["x"])


@given(shapes)
def test_tokens_are_unfolded_patches(shape: tuple[int, int, int, int, int]) -> None:
    batch, channels, rows, columns, p = shape
    x = numbered(batch, channels, rows * p, columns * p)
    assert torch.equal(patchify(x, p), F.unfold(x, p, stride=p).transpose(1, 2))


@given(shapes)
def test_pixels_are_tokens_with_channels_last(shape: tuple[int, int, int, int, int]) -> None:
    batch, channels, rows, columns, p = shape
    x = numbered(batch, channels, rows * p, columns * p)
    tokens = patchify(x, p).reshape(batch * rows * columns, channels, p * p)
    assert torch.equal(to_pixels(x, p), tokens.transpose(1, 2))


@given(shapes)
def test_from_pixels_is_the_inverse(shape: tuple[int, int, int, int, int]) -> None:
    batch, channels, rows, columns, p = shape
    x = numbered(batch, channels, rows * p, columns * p)
    assert torch.equal(from_pixels(to_pixels(x, p), rows * p, columns * p, p), x)


def test_one_pixel_by_hand() -> None:
    p, height, width = 4, 8, 12
    x = torch.zeros(2, 3, height, width)
    x[1, 2, 5, 10] = 1  # patch row 1, patch column 2; inside of it row 1, column 2
    patch = 1 * (width // p) + 2
    token = torch.zeros(2, 6, 3 * p * p)
    token[1, patch, 2 * p * p + 1 * p + 2] = 1
    assert torch.equal(patchify(x, p), token)
    pixels = torch.zeros(2 * 6, p * p, 3)
    pixels[6 + patch, 1 * p + 2, 2] = 1
    assert torch.equal(to_pixels(x, p), pixels)
