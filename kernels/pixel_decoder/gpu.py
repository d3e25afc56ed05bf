"""The pixel decoder on a GPU: a library's product for the upsampling, then one Triton kernel.

The upsampling stays outside of the kernel: its product is large enough for the library to come near
the machine's peak, and the backward pass needs y in memory anyway. Beside its inputs the forward
pass keeps y alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from deco_fast.kernels.pixel_decoder.folding import (
    RGB,
    fold_blocks,
    fold_blocks_backward,
    fold_input_projections,
    fold_input_projections_backward,
)
from deco_fast.kernels.pixel_decoder.gpu_kernels import (
    COLORS,
    MATRICES,
    backward_kernel,
    forward_kernel,
)
from deco_fast.kernels.specialisation import Specialisation

CHANNELS = (16, 32, 64)
PATCH_SIZES = (1, 2, 4, 8, 16, 32)
MAX_BLOCKS = 6

_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    pixels: int
    warps: int
    programs: int
    """Programs for each multiprocessor: as many as fit, for each takes tiles until none is left."""


_COMPUTE_TILES = {
    # channels, half precision: forward, backward
    (16, True): (Tile(64, 4, 4), Tile(64, 4, 2)),
    (32, True): (Tile(64, 4, 2), Tile(64, 4, 2)),
    (64, True): (Tile(64, 4, 1), Tile(64, 8, 1)),
    (16, False): (Tile(64, 4, 4), Tile(64, 4, 2)),
    (32, False): (Tile(64, 4, 2), Tile(64, 4, 2)),
    (64, False): (Tile(64, 8, 1), Tile(64, 8, 1)),
}

GROUP = 8
"""Tiles that a program of the backward kernel takes through all blocks at a time: enough to make
little of loading and storing a block's sums, few enough for the scratch memory to stay in cache."""


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    blocks: int
    patch_size: int
    dtype: torch.dtype

    def tiles(self, capability: int) -> tuple[Tile, Tile]:
        """For the forward and the backward kernel."""
        return _COMPUTE_TILES[self.channels, self.dtype != torch.float32]

    def constants(self, tile: Tile, interpreted: bool) -> dict[str, Any]:
        """The arguments that both kernels are compiled with."""
        return {
            "NUM_BLOCKS": self.blocks,
            "C": self.channels,
            "P": self.patch_size,
            "BLOCK": tile.pixels,
            "APPROXIMATE": self.dtype != torch.float32 and not interpreted,
        }

    def forward_constants(self, tile: Tile, interpreted: bool) -> dict[str, Any]:
        """All of the forward kernel."""
        hoist = self.dtype != torch.float32 and self.blocks * self.channels**2 <= 3 * 32**2
        return self.constants(tile, interpreted) | {"HOIST": hoist}

    def backward_constants(self, tile: Tile, interpreted: bool) -> dict[str, Any]:
        """All of the backward kernel."""
        return self.constants(tile, interpreted) | {"GROUP": GROUP}


class _Work(NamedTuple):
    """The tiles of one call, and the programs that share them."""

    num_tiles: int
    programs: int
    tiles_per_patch: int

    @classmethod
    def cut(cls, num_patches: int, area: int, tile: Tile, device: torch.device) -> _Work:
        num_tiles = triton.cdiv(num_patches * area, tile.pixels)
        tiles_per_patch = max(1, area // tile.pixels)
        programs = min(tile.programs * _multiprocessors(device), num_tiles)
        # A multiple, so that all tiles of a program lie at the same place of their patches.
        return cls(num_tiles, triton.cdiv(programs, tiles_per_patch) * tiles_per_patch, tiles_per_patch)


def _interpreted(device: torch.device) -> bool:
    return device.type == "cpu"


def _multiprocessors(device: torch.device) -> int:
    if _interpreted(device):
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> int:
    if _interpreted(device):
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class _Folded(NamedTuple):
    """The small parameters as both kernels read them."""

    matrices: Tensor  # (blocks, 5, C, C), (in, out)
    vectors: Tensor  # (blocks, 5, C) float32
    output_matrix: Tensor  # (C, 16)
    output_vector: Tensor  # (16,) float32
    rgb_matrix: Tensor  # (C, 16)
    rgb_vectors: Tensor  # (3, C) float32
    table: Tensor  # (p², C) float32

    @classmethod
    def of(cls, small: Sequence[Tensor], patch_size: int, dtype: torch.dtype) -> _Folded:
        inputs, blocks, (output_weight, output_bias) = small[:4], small[4:-2], small[-2:]
        rgb_weight, table = fold_input_projections(inputs, patch_size)
        matrices, vectors = fold_blocks(blocks)
        padding = (0, COLORS.value - RGB)
        return cls(
            matrices.mT.to(dtype).contiguous(),
            vectors,
            F.pad(output_weight.T, padding).to(dtype),
            F.pad(output_bias, padding).float(),
            F.pad(rgb_weight, padding).to(dtype),
            rgb_weight.T.contiguous(),
            table,
        )


def _shape(tokens: Tensor, small: Sequence[Tensor], patch_size: int) -> Shape:
    shape = Shape(small[3].shape[0], (len(small) - 6) // 8, patch_size, tokens.dtype)
    if shape.channels not in CHANNELS or patch_size not in PATCH_SIZES:
        raise ValueError(
            f"the Triton pixel decoder takes {CHANNELS} channels and patch sizes {PATCH_SIZES}, "
            f"not {shape.channels} and {patch_size}"
        )
    if not 1 <= shape.blocks <= MAX_BLOCKS:
        raise ValueError(
            f"the Triton pixel decoder takes 1 to {MAX_BLOCKS} blocks, not {shape.blocks}"
        )
    return shape


def forward(
    x: Tensor,
    tokens: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """The velocity, and the upsampled tokens y for the backward pass, as `deco_fast::pixel_decoder`.

    Raises:
        ValueError: a number of channels or blocks or a patch size that the kernels do not take.
    """
    shape = _shape(tokens, small, patch_size)
    dtype = tokens.dtype
    x = x.contiguous()
    y = F.linear(tokens, upsample_weight.to(dtype), upsample_bias.to(dtype)).flatten()
    velocity = torch.empty(x.shape, dtype=dtype, device=x.device)
    folded = _Folded.of(small, patch_size, dtype)
    tile, _ = shape.tiles(_capability(x.device))
    num_patches = tokens.shape[0] * tokens.shape[1]
    work = _Work.cut(num_patches, patch_size**2, tile, x.device)
    with torch.cuda.device_of(x):
        forward_kernel[(work.programs,)](
            x,
            y,
            velocity,
            folded.matrices,
            folded.vectors,
            folded.output_matrix,
            folded.output_vector,
            folded.rgb_vectors,
            folded.table,
            work.num_tiles,
            num_patches,
            tokens.shape[1],
            x.shape[-1] // patch_size,
            **shape.forward_constants(tile, _interpreted(x.device)),
            num_warps=tile.warps,
            num_stages=1,
        )
    return velocity, y


def backward(
    grad_velocity: Tensor,
    x: Tensor,
    tokens: Tensor,
    y: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
    need_x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """All gradients, as `deco_fast::pixel_decoder_backward`; the same bits at every run.

    Raises:
        ValueError: as `forward`.
    """
    shape = _shape(tokens, small, patch_size)
    channels, blocks, _, dtype = shape
    grad_velocity, x = grad_velocity.contiguous(), x.contiguous()
    folded = _Folded.of(small, patch_size, dtype)
    _, tile = shape.tiles(_capability(x.device))
    num_patches, area = tokens.shape[0] * tokens.shape[1], patch_size**2
    work = _Work.cut(num_patches, area, tile, x.device)

    grad_x = torch.empty_like(x) if need_x_grad else None
    grad_y = torch.empty_like(y)
    scratch = (work.programs, GROUP, tile.pixels, channels)
    inputs = y.new_empty((blocks - 1, *scratch))
    grad_h = y.new_empty(scratch, dtype=torch.float32)
    sizes = _partial_sizes(shape, tile)
    partials = x.new_zeros((work.programs, sum(sizes)), dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_kernel[(work.programs,)](
            grad_velocity,
            x,
            y,
            folded.matrices,
            folded.vectors,
            folded.output_matrix,
            folded.rgb_matrix,
            folded.rgb_vectors,
            folded.table,
            grad_x,
            grad_y,
            inputs,
            grad_h,
            partials,
            work.num_tiles,
            num_patches,
            tokens.shape[1],
            x.shape[-1] // patch_size,
            **shape.backward_constants(tile, _interpreted(x.device)),
            num_warps=tile.warps,
            num_stages=1,
        )

    grad_small = _sum_partials(partials, sizes, shape, work, small)
    grad_y = grad_y.view(num_patches, area * channels)
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        (grad_y @ upsample_weight.to(dtype)).view_as(tokens),
        (grad_y.T @ tokens.reshape(num_patches, -1)).to(upsample_weight.dtype),
        grad_y.sum(0, dtype=torch.float32).to(upsample_bias.dtype),
        [grad.to(parameter.dtype) for grad, parameter in zip(grad_small, small, strict=True)],
    )


def _partial_sizes(shape: Shape, tile: Tile) -> list[int]:
    """What a program's row of partial sums holds: the five affine maps of every block, the output
    projection, the projection of the colours, and the rows of the table.

    An affine map with C inputs has 2C rows: input i in row 2i, and the bias in row 1.
    """
    channels = shape.channels
    colors = 2 * channels * COLORS.value
    blocks = shape.blocks * MATRICES.value * 2 * channels**2
    return [blocks, colors, colors, tile.pixels * channels]


def _sum_partials(
    partials: Tensor, sizes: list[int], shape: Shape, work: _Work, small: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of the small parameters in float32 from the programs' partial sums."""
    channels, blocks, patch_size, _ = shape
    by_place = partials.unflatten(0, (-1, work.tiles_per_patch)).sum(0)
    table = by_place[:, -sizes[-1] :].reshape(-1, patch_size**2, channels).sum(0)
    affine, output, rgb, _ = by_place.sum(0).split(sizes)
    affine = affine.view(blocks, MATRICES.value, 2 * channels, channels)
    output, rgb = (t.view(2 * channels, -1)[:, :RGB] for t in (output, rgb))
    return [
        *fold_input_projections_backward(rgb[::2], table, small[:4], patch_size),
        *fold_blocks_backward(affine[:, :, ::2].mT, affine[:, :, 1], small[4:-2]),
        output[::2].T,
        output[1],
    ]


def specialisations(capability: int) -> Iterator[Specialisation]:
    """What `forward` and `backward` launch for each dtype and number of channels, at DeCo-XL's
    three blocks and patches of 16, and for the most blocks."""
    for dtype, name in _TRITON_TYPES.items():
        for channels, blocks in ((16, 3), (32, 3), (64, 3), (32, MAX_BLOCKS)):
            shape = Shape(channels, blocks, 16, dtype)
            suffix = f"{dtype} C={channels} blocks={blocks}".removeprefix("torch.")
            forward_tile, backward_tile = shape.tiles(capability)
            yield _specialisation(
                f"pixel_decoder_forward {suffix}",
                forward_kernel,
                forward_tile,
                shape.forward_constants(forward_tile, interpreted=False),
                name,
            )
            yield _specialisation(
                f"pixel_decoder_backward {suffix}",
                backward_kernel,
                backward_tile,
                shape.backward_constants(backward_tile, interpreted=False),
                name,
            )


_FLOAT32_ARGUMENTS = {"vectors", "output_vector", "rgb_vectors", "table", "grad_h", "partials"}
_INTEGER_ARGUMENTS = {"num_tiles", "num_patches", "patches", "patch_columns"}


def _specialisation(
    name: str, kernel: Any, tile: Tile, constants: dict[str, Any], dtype: str
) -> Specialisation:
    types = {}
    for argument in kernel.arg_names:
        if argument in _INTEGER_ARGUMENTS:
            types[argument] = "i32"
        elif argument in _FLOAT32_ARGUMENTS:
            types[argument] = "*fp32"
        elif argument not in constants:
            types[argument] = f"*{dtype}"
    return Specialisation(
        name,
        kernel,
        types,
        constants,
        num_warps=tile.warps,
        tensor_cores=dtype != "fp32",
    )
