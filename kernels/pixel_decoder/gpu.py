"""The pixel decoder on a GPU: a library's product for the upsampling, then Triton kernels.

The upsampling stays outside of the kernels: its product is large enough for the library to come
near the machine's peak, and the backward pass needs y in memory anyway.

Beside its inputs the forward pass keeps y and, where `keep_inputs` says so, the inputs of all
blocks but the first. Otherwise the backward pass makes these again, for a limited number of pixels
at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from deco_fast.kernels import tuning
from deco_fast.kernels.pixel_decoder.folding import RGB, position_features
from deco_fast.kernels.pixel_decoder.fused import CHANNELS, MAX_BLOCKS, PATCH_SIZES
from deco_fast.kernels.pixel_decoder.gpu_folding import fold_backward_kernel, fold_kernel
from deco_fast.kernels.pixel_decoder.gpu_kernels import (
    COLORS,
    MATRICES,
    backward_kernel,
    forward_kernel,
)
from deco_fast.kernels.pixel_decoder.gpu_tiles import Shape, Tile, candidates, fits_shared_memory
from deco_fast.kernels.pixel_decoder.reference import POSITION_FEATURES
from deco_fast.kernels.registration import block_inputs_shape
from deco_fast.kernels.shapes import expect
from deco_fast.kernels.specialisation import Specialisation

PIXELS_AT_A_TIME = 2**20
"""Pixels, a power of two, that the backward pass takes through all blocks before it goes on: few
enough for what goes from launch to launch to cost little memory, enough to make little of a launch.
"""

FOLD_LAUNCH = {"ROWS": 16, "num_stages": 1}


def _fold_warps(channels: int) -> int:
    return channels // 4


class _Work(NamedTuple):
    """The tiles of one call, and the programs that share them."""

    num_patches: int
    patches: int  # of an image
    patch_columns: int
    num_tiles: int
    tiles_per_patch: int
    programs: int

    @classmethod
    def cut(cls, x: Tensor, tokens: Tensor, shape: Shape, tile: Tile) -> _Work:
        batch, patches, _ = tokens.shape
        area = shape.patch_size**2
        num_tiles = triton.cdiv(batch * patches * area, tile.pixels)
        tiles_per_patch = max(1, area // tile.pixels)
        programs = min(tile.programs * _multiprocessors(x.device), num_tiles)
        # A multiple, so that all tiles of a program lie at the same place of their patches.
        programs = triton.cdiv(programs, tiles_per_patch) * tiles_per_patch
        columns = x.shape[-1] // shape.patch_size
        return cls(batch * patches, patches, columns, num_tiles, tiles_per_patch, programs)


def _interpreted(device: torch.device) -> bool:
    return device.type == "cpu"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if _interpreted(device):
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: torch.device) -> int:
    if _interpreted(device):
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class _Folded(NamedTuple):
    """The small parameters as the decoder's kernels read them."""

    matrices: Tensor  # (blocks, 5, C, C), (in, out)
    vectors: Tensor  # (blocks, 5, C) float32
    output_matrix: Tensor  # (C, 16)
    output_vector: Tensor  # (16,) float32
    rgb_vectors: Tensor  # (3, C) float32
    table: Tensor  # (p², C) float32

    @classmethod
    def of(cls, flat: Tensor, shape: Shape, position: str) -> _Folded:
        channels, blocks, patch_size, dtype = shape
        area, colors = patch_size**2, COLORS.value
        folded = cls(
            flat.new_empty((blocks, MATRICES.value, channels, channels), dtype=dtype),
            flat.new_empty((blocks, MATRICES.value, channels)),
            flat.new_empty((channels, colors), dtype=dtype),
            flat.new_empty(colors),
            flat.new_empty((RGB, channels)),
            flat.new_empty((area, channels)),
        )
        programs = blocks + triton.cdiv(area, FOLD_LAUNCH["ROWS"])
        fold_kernel[(programs,)](
            flat,
            position_features(patch_size, flat.device, position),
            *folded,
            NUM_BLOCKS=blocks,
            C=channels,
            AREA=area,
            num_warps=_fold_warps(channels),
            **FOLD_LAUNCH,
        )
        return folded


def _flat(small: Sequence[Tensor]) -> Tensor:
    """All small parameters in one float32 tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in small]).float()


def _separate(flat: Tensor, small: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_flat`, in the dtypes of `small`."""
    # Converted at once where all have the same dtype: one launch, and not one for each.
    flat = flat.to(functools.reduce(torch.promote_types, (tensor.dtype for tensor in small)))
    pieces = [flat.new_empty(tensor.numel()) for tensor in small]
    # Not split_with_sizes_copy, which passes addresses through the host's memory: a graph would
    # read them there again at every replay.
    torch._foreach_copy_(pieces, list(flat.split([piece.numel() for piece in pieces])))
    return [
        piece.view(tensor.shape).to(tensor.dtype)
        for piece, tensor in zip(pieces, small, strict=True)
    ]


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


def _check(
    x: Tensor, tokens: Tensor, upsample_weight: Tensor, small: Sequence[Tensor], shape: Shape
) -> None:
    c, p = shape.channels, shape.patch_size
    batch, _, width = tokens.shape
    rows, columns = (side // p for side in x.shape[-2:])
    expect(x, (batch, 3, rows * p, columns * p), "x")
    expect(tokens, (batch, rows * columns, width), "tokens")
    expect(upsample_weight, (p * p * c, width), "upsample_weight")
    expected = [(c, 3 + POSITION_FEATURES), (c,), (c, c), (c,)]
    expected += shape.blocks * [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c, c), (c,)]
    expected += [(3, c), (3,)]
    for i, (tensor, size) in enumerate(zip(small, expected, strict=True)):
        expect(tensor, size, f"small parameter {i} of the decoder")


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
    """See `deco_fast.kernels.registration`.

    Raises:
        ValueError: a number of channels or blocks or a patch size that the kernels do not take, or
            shapes that do not fit.
    """
    shape = _shape(tokens, small, patch_size)
    _check(x, tokens, upsample_weight, small, shape)
    dtype = tokens.dtype
    x = x.contiguous()
    y = F.linear(tokens, upsample_weight.to(dtype), upsample_bias.to(dtype)).flatten()
    velocity = torch.empty(x.shape, dtype=dtype, device=x.device)
    inputs = y.new_empty(block_inputs_shape(y, small, keep_inputs))
    with torch.cuda.device_of(x):
        folded = _Folded.of(_flat(small), shape, position)
        pixels = range(y.numel() // shape.channels)

        def run(tile: Tile) -> None:
            _launch_forward(x, tokens, y, velocity, inputs, folded, shape, pixels, tile)

        kept = ", keeping inputs" if inputs.numel() > 0 else ""
        tile = shape.forward_tile(_capability(x.device))
        run(_choose(f"forward{kept}", shape, x, tile, run))
    return velocity, y if keep_y else y.new_empty(0), inputs


def _choose(
    direction: str,
    shape: Shape,
    x: Tensor,
    tile: Tile,
    run: Callable[[Tile], object],
) -> Tile:
    """The table's tile, or with DECO_AUTOTUNE=1 the fastest; a graph under capture has no time to
    find out, and takes what the calls before it found."""
    if _interpreted(x.device) or not tuning.is_on():
        return tile
    # Pixels to the next power of two: much the same work has the same best tile.
    pixels = 2 ** (x[:, 0].numel() - 1).bit_length()
    problem = f"pixel_decoder {direction}, {shape}, {pixels} pixels"
    gpu = torch.cuda.get_device_name(x.device)
    if torch.cuda.is_current_stream_capturing():
        return tuning.known(problem, gpu, candidates(tile)) or tile
    return tuning.fastest(problem, gpu, candidates(tile), run)


def _launch_forward(
    x: Tensor,
    tokens: Tensor,
    y: Tensor,
    velocity: Tensor | None,
    inputs: Tensor,
    folded: _Folded,
    shape: Shape,
    pixels: range,
    tile: Tile,
) -> None:
    """The forward kernel for a range of pixels; `inputs` is written if it has any."""
    work = _Work.cut(x, tokens, shape, tile)
    forward_kernel[(work.programs,)](
        x,
        y,
        velocity,
        inputs if inputs.numel() > 0 else None,
        folded.matrices,
        folded.vectors,
        folded.output_matrix,
        folded.output_vector,
        folded.rgb_vectors,
        folded.table,
        pixels.start // tile.pixels,
        triton.cdiv(pixels.stop, tile.pixels),
        work.num_patches,
        work.patches,
        work.patch_columns,
        **shape.forward_constants(tile, _interpreted(x.device)),
        num_warps=tile.warps,
        num_stages=1,
    )


def backward(
    grad_velocity: Tensor,
    x: Tensor,
    tokens: Tensor,
    y: Tensor,
    inputs: Tensor,
    upsample_weight: Tensor,
    upsample_bias: Tensor,
    small: Sequence[Tensor],
    patch_size: int,
    position: str,
    need_x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """See `deco_fast.kernels.registration`; the same bits at every run.

    Raises:
        ValueError: as `forward`.
    """
    shape = _shape(tokens, small, patch_size)
    dtype = shape.dtype
    flat = _flat(small)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x_grad else None
    grad_y = torch.empty_like(y)
    with torch.cuda.device_of(x):
        folded = _Folded.of(flat, shape, position)
        grad_velocity, x = grad_velocity.contiguous(), x.contiguous()

        def run(tile: Tile) -> Tensor:
            return _launch_backward(
                grad_velocity, x, tokens, y, inputs, grad_x, grad_y, folded, shape, tile
            )

        tile = shape.backward_tile(_capability(x.device))
        tile = _choose("backward", shape, x, tile, run)
        sums = run(tile)
        grad_flat = torch.empty_like(flat)
        fold_backward_kernel[(shape.blocks + 1,)](
            sums,
            flat,
            position_features(patch_size, x.device, position),
            grad_flat,
            *sums.shape,
            NUM_BLOCKS=shape.blocks,
            C=shape.channels,
            AREA=patch_size**2,
            BLOCK=tile.pixels,
            num_warps=_fold_warps(shape.channels),
            **FOLD_LAUNCH,
        )

    grad_y = grad_y.view(-1, upsample_bias.shape[0])
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        (grad_y @ upsample_weight.to(dtype)).view(tokens.shape),
        (grad_y.T @ tokens.flatten(0, 1)).to(upsample_weight.dtype),
        grad_y.sum(0, dtype=torch.float32).to(upsample_bias.dtype),
        _separate(grad_flat, small),
    )


def _launch_backward(
    grad_velocity: Tensor,
    x: Tensor,
    tokens: Tensor,
    y: Tensor,
    inputs: Tensor,
    grad_x: Tensor | None,
    grad_y: Tensor,
    folded: _Folded,
    shape: Shape,
    tile: Tile,
) -> Tensor:
    """The backward kernel for all tiles and blocks.

    Returns:
        The sums for the parameters, added up over programs whose tiles lie at the same place of
        their patches.
    """
    forward_tile = shape.forward_tile(_capability(x.device))
    work = _Work.cut(x, tokens, shape, tile)
    partials = x.new_empty((work.programs, _partial_size(shape, tile)), dtype=torch.float32)
    for pixels in _shares(y.numel() // shape.channels, shape.patch_size):
        own_inputs = y.new_empty((0, len(pixels), shape.channels))
        if shape.blocks > 1 and inputs.numel() > 0:
            own_inputs = inputs[:, pixels.start : pixels.stop]
        elif shape.blocks > 1:
            own_inputs = y.new_empty((shape.blocks - 1, len(pixels), shape.channels))
            _launch_forward(x, tokens, y, None, own_inputs, folded, shape, pixels, forward_tile)
        first, end = pixels.start // tile.pixels, triton.cdiv(pixels.stop, tile.pixels)
        grad_h = None
        if shape.blocks > 1:
            scratch = (end - first) * tile.pixels, shape.channels
            grad_h = y.new_empty(scratch, dtype=torch.float32)
        for block in reversed(range(shape.blocks)):
            constants = shape.backward_constants(tile, block, _interpreted(x.device))
            is_first, is_last = constants["FIRST"], constants["LAST"]
            backward_kernel[(work.programs,)](
                grad_velocity if is_last else None,
                x if is_first else None,
                y,
                None if is_first else own_inputs[block - 1],
                folded.matrices,
                folded.vectors,
                folded.output_matrix,
                folded.rgb_vectors,
                folded.table,
                grad_x if is_first else None,
                grad_y,
                grad_h,
                partials,
                partials.shape[1],
                block,
                first,
                end,
                work.num_patches,
                work.patches,
                work.patch_columns,
                **constants,
                num_warps=tile.warps,
                num_stages=1,
            )
    return partials.unflatten(0, (-1, work.tiles_per_patch)).sum(0)


def _shares(pixels: int, patch_size: int) -> Iterator[range]:
    """The pixels that the backward pass takes at a time: whole patches, and whole tiles."""
    step = max(PIXELS_AT_A_TIME, patch_size**2)
    for start in range(0, pixels, step):
        yield range(start, min(start + step, pixels))


def _partial_size(shape: Shape, tile: Tile) -> int:
    """Of a program's sums: the output's bias and weight, the colours' weight, the program's rows of
    the table, and of every block five matrices and their vectors."""
    channels = shape.channels
    ends = COLORS.value + 2 * RGB * channels + tile.pixels * channels
    return ends + shape.blocks * MATRICES.value * (channels + 1) * channels


_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_FLOAT32_ARGUMENTS = {
    *("vectors", "output_vector", "rgb_vectors", "table", "grad_h", "partials"),
    *("sums", "flat", "position", "grads"),
}
_INTEGER_ARGUMENTS = {
    *("first", "end", "num_patches", "patches", "patch_columns"),
    *("block", "places", "partial_size"),
}


def specialisations(capability: int) -> Iterator[Specialisation]:
    """What `forward` and `backward` launch at patches of 16, for every number of channels."""
    for dtype, channels in itertools.product(_TRITON_TYPES, CHANNELS):
        if not fits_shared_memory(channels, dtype, capability):
            continue
        for blocks in (1, 3, MAX_BLOCKS):
            yield from _forward_specialisations(Shape(channels, blocks, 16, dtype), capability)
        # Of three blocks the first, the one in between and the last; then a single one.
        for blocks, block in ((3, 0), (3, 1), (3, 2), (1, 0)):
            yield _backward_specialisation(Shape(channels, blocks, 16, dtype), block, capability)
        yield from _fold_specialisations(Shape(channels, 3, 16, dtype), capability)


def _types(kernel: Any, constants: dict[str, Any], dtype: torch.dtype) -> dict[str, str]:
    types = {}
    for argument in kernel.arg_names:
        if argument in _INTEGER_ARGUMENTS:
            types[argument] = "i32"
        elif argument in _FLOAT32_ARGUMENTS and argument not in constants:
            types[argument] = "*fp32"
        elif argument not in constants:
            types[argument] = f"*{_TRITON_TYPES[dtype]}"
    return types


def _forward_specialisations(shape: Shape, capability: int) -> Iterator[Specialisation]:
    tile = shape.forward_tile(capability)
    constants = shape.forward_constants(tile)
    roles: dict[str, dict[str, None]] = {"": {"inputs": None}}
    if shape.blocks > 1:
        roles |= {", keeping inputs": {}, ", inputs alone": {"velocity": None}}
    for role, absent in roles.items():
        yield Specialisation(
            f"pixel_decoder_forward {_name(shape)} blocks={shape.blocks}{role}",
            forward_kernel,
            _types(forward_kernel, constants | absent, shape.dtype),
            constants | absent,
            num_warps=tile.warps,
            programs=tile.programs,
            tensor_cores=shape.half,
        )


def _backward_specialisation(shape: Shape, block: int, capability: int) -> Specialisation:
    tile = shape.backward_tile(capability)
    constants = shape.backward_constants(tile, block)
    first, last = constants["FIRST"], constants["LAST"]
    absent = [
        *(() if last else ("grad_velocity",)),
        *(("inputs",) if first else ("x", "grad_x")),
        *(("grad_h",) if first and last else ()),
    ]
    constants |= dict.fromkeys(absent)
    places = {(True, True): "only", (True, False): "first", (False, True): "last"}
    return Specialisation(
        f"pixel_decoder_backward {_name(shape)} {places.get((first, last), 'middle')} block",
        backward_kernel,
        _types(backward_kernel, constants, shape.dtype),
        constants,
        num_warps=tile.warps,
        programs=tile.programs,
        stack_bytes=shape.stack_bytes(capability),
        tensor_cores=shape.half,
    )


def _fold_specialisations(shape: Shape, capability: int) -> Iterator[Specialisation]:
    sizes = {"NUM_BLOCKS": shape.blocks, "C": shape.channels, "AREA": shape.patch_size**2}
    backward_sizes = sizes | {"BLOCK": shape.backward_tile(capability).pixels}
    for direction, kernel, constants in (
        ("", fold_kernel, sizes),
        ("_backward", fold_backward_kernel, backward_sizes),
    ):
        constants |= {"ROWS": FOLD_LAUNCH["ROWS"]}
        yield Specialisation(
            f"pixel_decoder_fold{direction} {_name(shape)}",
            kernel,
            _types(kernel, constants, shape.dtype),
            constants,
            num_warps=_fold_warps(shape.channels),
            stack_bytes=256 if direction else 0,
        )


def _name(shape: Shape) -> str:
    return f"{str(shape.dtype).removeprefix('torch.')} C={shape.channels}"
