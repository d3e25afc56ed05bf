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
from deco_fast.kernels.pixel_decoder.fused import CHANNELS, MAX_BLOCKS, PATCH_SIZES
from deco_fast.kernels.pixel_decoder.gpu_kernels import (
    COLORS,
    MATRICES,
    backward_kernel,
    forward_kernel,
)
from deco_fast.kernels.specialisation import Specialisation

_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    pixels: int
    warps: int
    programs: int
    """Programs for each multiprocessor: as many as fit, for each takes tiles until none is left."""


# Found by compiling ahead of time: the forward kernel spills no register at 16 and 32
# channels; larger tiles would, and smaller ones spend more on loading weights.
_FORWARD_TILES = {
    # channels, whether in half precision
    (16, True): Tile(64, 4, 4),
    (32, True): Tile(64, 4, 2),
    (64, True): Tile(64, 4, 1),
    (16, False): Tile(64, 4, 2),
    (32, False): Tile(16, 8, 1),
    (64, False): Tile(16, 8, 1),
}
_BACKWARD_TILES = {
    (16, True): Tile(64, 4, 2),
    (32, True): Tile(64, 4, 2),
    (64, True): Tile(64, 8, 1),
    (16, False): Tile(32, 4, 2),
    (32, False): Tile(16, 8, 1),
    (64, False): Tile(16, 8, 1),
}

_SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Of one program, by compute capability; where it is not known, the least of these."""

_FORWARD_OPERANDS = 12 * 1024
"""Shared memory that the forward kernel needs beside the matrices."""

GROUP = 8
"""Tiles that a program of the backward kernel takes through all blocks at a time: enough to make
little of loading and storing a block's sums, few enough for the scratch memory to stay in cache."""


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    blocks: int
    patch_size: int
    dtype: torch.dtype

    @property
    def half(self) -> bool:
        """Whether operands have 16 bits."""
        return self.dtype != torch.float32

    @property
    def forward_tile(self) -> Tile:
        """Of the forward kernel."""
        return _FORWARD_TILES[self.channels, self.half]

    @property
    def backward_tile(self) -> Tile:
        """Of the backward kernel."""
        return _BACKWARD_TILES[self.channels, self.half]

    def forward_constants(self, capability: int, interpreted: bool = False) -> dict[str, Any]:
        """The arguments that the forward kernel is compiled with."""
        matrices = self.blocks * MATRICES.value * self.channels**2 * self.dtype.itemsize
        available = _SHARED_MEMORY.get(capability, min(_SHARED_MEMORY.values()))
        hoist = self.half and matrices + _FORWARD_OPERANDS <= available
        return self._constants(self.forward_tile, interpreted) | {"HOIST": hoist}

    def backward_constants(self, interpreted: bool = False) -> dict[str, Any]:
        """The arguments that the backward kernel is compiled with."""
        return self._constants(self.backward_tile, interpreted) | {"GROUP": GROUP}

    def _constants(self, tile: Tile, interpreted: bool) -> dict[str, Any]:
        return {
            "NUM_BLOCKS": self.blocks,
            "C": self.channels,
            "P": self.patch_size,
            "BLOCK": tile.pixels,
            "APPROXIMATE": self.half and not interpreted,
        }


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
        programs = triton.cdiv(programs, tiles_per_patch) * tiles_per_patch
        return cls(num_tiles, programs, tiles_per_patch)


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
    """`deco_fast::pixel_decoder`: the velocity, and the upsampled tokens y for the backward pass.

    Raises:
        ValueError: a number of channels or blocks or a patch size that the kernels do not take.
    """
    shape = _shape(tokens, small, patch_size)
    dtype = tokens.dtype
    x = x.contiguous()
    y = F.linear(tokens, upsample_weight.to(dtype), upsample_bias.to(dtype)).flatten()
    velocity = torch.empty(x.shape, dtype=dtype, device=x.device)
    folded = _Folded.of(small, patch_size, dtype)
    tile = shape.forward_tile
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
            **shape.forward_constants(_capability(x.device), _interpreted(x.device)),
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
    """`deco_fast::pixel_decoder_backward`: all gradients, the same bits at every run.

    Raises:
        ValueError: as `forward`.
    """
    shape = _shape(tokens, small, patch_size)
    channels, blocks, _, dtype = shape
    grad_velocity, x = grad_velocity.contiguous(), x.contiguous()
    folded = _Folded.of(small, patch_size, dtype)
    tile = shape.backward_tile
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
            **shape.backward_constants(_interpreted(x.device)),
            num_warps=tile.warps,
            num_stages=1,
        )

    grad_small = _sum_partials(partials, sizes, shape, work, small)
    grad_y = grad_y.view(num_patches, area * channels)
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        (grad_y @ upsample_weight.to(dtype)).view_as(tokens),
        (grad_y.T @ tokens.flatten(0, 1)).to(upsample_weight.dtype),
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


_STACK_BYTES = {(16, True): 64, (32, True): 1024, (16, False): 1024, (32, False): 1024}
"""Stack of a backward kernel's thread, which holds what it spills, by channels and precision."""


def specialisations(capability: int) -> Iterator[Specialisation]:
    """What `forward` and `backward` launch at patches of 16: DeCo-XL's three blocks, and the most.

    64 channels are not held to limits yet: their backward kernels spill, and so does the forward
    kernel in half precision where the matrices of all blocks exceed the shared memory.
    """
    for dtype in _TRITON_TYPES:
        for channels, blocks in ((16, 3), (32, 3), (32, MAX_BLOCKS)):
            shape = Shape(channels, blocks, 16, dtype)
            yield _specialisation(
                "forward",
                forward_kernel,
                shape,
                shape.forward_tile,
                shape.forward_constants(capability),
            )
            yield _specialisation(
                "backward",
                backward_kernel,
                shape,
                shape.backward_tile,
                shape.backward_constants(),
            )


_FLOAT32_ARGUMENTS = {"vectors", "output_vector", "rgb_vectors", "table", "grad_h", "partials"}
_INTEGER_ARGUMENTS = {"num_tiles", "num_patches", "patches", "patch_columns"}


def _specialisation(
    direction: str, kernel: Any, shape: Shape, tile: Tile, constants: dict[str, Any]
) -> Specialisation:
    dtype = str(shape.dtype).removeprefix("torch.")
    types = {}
    for argument in kernel.arg_names:
        if argument in _INTEGER_ARGUMENTS:
            types[argument] = "i32"
        elif argument in _FLOAT32_ARGUMENTS:
            types[argument] = "*fp32"
        elif argument not in constants:
            types[argument] = f"*{_TRITON_TYPES[shape.dtype]}"
    return Specialisation(
        f"pixel_decoder_{direction} {dtype} C={shape.channels} blocks={shape.blocks}",
        kernel,
        types,
        constants,
        num_warps=tile.warps,
        stack_bytes=_STACK_BYTES[shape.channels, shape.half] if direction == "backward" else 0,
        tensor_cores=shape.half,
    )
