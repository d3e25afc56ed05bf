"""The training loss on a GPU: both terms and the gradient in one pass over the images (Triton).

With X an 8×8 block of the difference in one of Y, Cb, Cr, A the DCT matrix and m the number of
coefficients of the batch:

    C                =  A X Aᵀ
    frequency        =  1/m · Σ table ∘ C²
    ∂frequency/∂X    =  2/m · Aᵀ (table ∘ C) A

A program takes 16 consecutive blocks, a thread one column of one block. Transforming columns is
arithmetic between the registers of a thread; the threads exchange data only to turn columns into
rows and back. Each program writes its two sums, which one program then adds up in float64: no
atomics, the same bits at every run.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_fast.kernels.flow_matching_loss.reference import BLOCK, RGB_TO_YCBCR
from deco_fast.kernels.registration import loss_gradient_dtype
from deco_fast.kernels.shapes import expect
from deco_fast.kernels.specialisation import Specialisation

# The eight columns of 16 blocks are the columns of 128 threads.
LOSS_LAUNCH: Final = {"BLOCKS": 16, "num_warps": 4, "num_stages": 1}
MEAN_LAUNCH: Final = {"STEP": 1024, "num_warps": 4, "num_stages": 1}
SCALE_LAUNCH: Final = {"STEP": 8192, "num_warps": 8, "num_stages": 1}

# cos(kπ/16)/2: the entries of the orthonormal 8-point DCT-II matrix. In the interpreter a constant
# has to be the right factor.
C1, C2, C3, C4, C5, C6, C7 = (tl.constexpr(math.cos(k * math.pi / 16) / 2) for k in range(1, 8))

(YR, YG, YB), (BR, BG, BB), (RR, RG, RB) = (
    tuple(map(tl.constexpr, row)) for row in RGB_TO_YCBCR
)  # Y, Cb and Cr


@triton.jit
def _dct(x):
    """The DCT of eight tensors, element by element."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    # Even coefficients see only the sums of mirrored elements, odd ones only the differences.
    a0, a1, a2, a3 = x0 + x7, x1 + x6, x2 + x5, x3 + x4
    b0, b1, b2, b3 = x0 - x7, x1 - x6, x2 - x5, x3 - x4
    c0, c1, d0, d1 = a0 + a3, a1 + a2, a0 - a3, a1 - a2
    return (
        (c0 + c1) * C4,
        b0 * C1 + b1 * C3 + b2 * C5 + b3 * C7,
        d0 * C2 + d1 * C6,
        b0 * C3 - b1 * C7 - b2 * C1 - b3 * C5,
        (c0 - c1) * C4,
        b0 * C5 - b1 * C1 + b2 * C7 + b3 * C3,
        d0 * C6 - d1 * C2,
        b0 * C7 - b1 * C5 + b2 * C3 - b3 * C1,
    )


@triton.jit
def _inverse_dct(x):
    """The inverse, and transpose, of `_dct`."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    c0, c1, d0, d1 = (x0 + x4) * C4, (x0 - x4) * C4, x2 * C2 + x6 * C6, x2 * C6 - x6 * C2
    a0, a1, a2, a3 = c0 + d0, c1 + d1, c1 - d1, c0 - d0
    b0 = x1 * C1 + x3 * C3 + x5 * C5 + x7 * C7
    b1 = x1 * C3 - x3 * C7 - x5 * C1 - x7 * C5
    b2 = x1 * C5 - x3 * C1 + x5 * C7 + x7 * C3
    b3 = x1 * C7 - x3 * C5 + x5 * C3 - x7 * C1
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a3 - b3, a2 - b2, a1 - b1, a0 - b0


@triton.jit
def _transpose(x):
    """From the eight rows of N blocks, each (N, 8), to their eight columns, or back."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    rows_NXY = tl.join(even, odd).reshape(x0.shape[0], 8, 8)
    # The columns' number goes to the first axes, which a thread holds as a whole in registers:
    # so Triton exchanges all data between threads once, before the first split, and not at each.
    columns = rows_NXY.permute(1, 0, 2).reshape(2, 2, 2, x0.shape[0], 8).permute(0, 1, 3, 4, 2)
    even, odd = tl.split(columns)
    x04, x26 = tl.split(even.permute(0, 2, 3, 1))
    x15, x37 = tl.split(odd.permute(0, 2, 3, 1))
    x0, x4 = tl.split(x04.permute(1, 2, 0))
    x2, x6 = tl.split(x26.permute(1, 2, 0))
    x1, x5 = tl.split(x15.permute(1, 2, 0))
    x3, x7 = tl.split(x37.permute(1, 2, 0))
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _mix(a, red, b, green, c, blue):
    """a · red + b · green + c · blue, row by row."""
    rows = ()
    for i in tl.static_range(8):
        rows += (red[i] * a + green[i] * b + blue[i] * c,)
    return rows


@triton.jit
def _frequency(x, table, valid):
    """Of one colour component: Σ table ∘ C² as (N, 8), and the rows of Aᵀ (table ∘ C) A."""
    coefficients = _dct(_transpose(_dct(x)))
    weighted = ()
    squares = 0.0
    for v in tl.static_range(8):
        place = tl.broadcast_to(table + tl.arange(0, 8)[None, :] * 8 + v, coefficients[v].shape)
        weight = tl.load(place, mask=valid, other=0)
        weighted += (weight * coefficients[v],)
        squares += weighted[v] * coefficients[v]
    return squares, _inverse_dct(_transpose(_inverse_dct(weighted)))


@triton.jit
def _reflect(place, size):
    """Where position `place` of the padded side lies in one of `size` pixels."""
    period = tl.maximum(2 * (size - 1), 1)
    place = place % period
    return tl.minimum(tl.minimum(place, period - place), size - 1)


@triton.jit
def _lines(first, stride):
    lines = ()
    for i in tl.static_range(8):
        lines += (first + i * stride,)
    return lines


@triton.jit
def _reflected_lines(first, y, height, width):
    lines = ()
    for i in tl.static_range(8):
        lines += (first + _reflect(y + i, height).to(tl.int64) * width,)
    return lines


@triton.jit
def _difference(prediction, target, rows, valid):
    difference = ()
    for i in tl.static_range(8):
        p = tl.load(prediction + rows[i], mask=valid, other=0).to(tl.float32)
        t = tl.load(target + rows[i], mask=valid, other=0).to(tl.float32)
        difference += (p - t,)
    return difference


@triton.jit(do_not_specialize=["height", "width", "block_rows", "block_columns", "blocks"])
def loss_kernel(
    prediction,  # (B, 3, H, W)
    target,  # (B, 3, H, W)
    table,  # (3, 8, 8) float32
    timestep_weight,  # (B,) float32, or None
    partials,  # (2, programs) float32: sums of weight · difference² and of table ∘ C²
    gradient,  # (B, 3, 8 · block_rows, 8 · block_columns), or None
    height,
    width,
    block_rows,  # in an image
    block_columns,
    blocks,  # in all images
    difference_scale,  # 2 / number of pixel values
    frequency_scale,  # 2 · weight / number of coefficients
    PADDED: tl.constexpr,  # whether a side is no multiple of 8
    BLOCKS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    block = program * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    valid = block < blocks
    y = block % (block_rows * block_columns) // block_columns * 8
    x = block % block_columns * 8 + tl.arange(0, 8)[None, :]
    # Offsets are 64 bits wide: a batch may have more than 2³¹ values.
    image = (block // (block_rows * block_columns)).to(tl.int64)
    stride = block_columns * 8
    plane = block_rows.to(tl.int64) * 8 * stride
    place = image * 3 * plane + y.to(tl.int64) * stride + x
    source, source_plane = _lines(place, stride), plane
    if PADDED:
        source_plane = height.to(tl.int64) * width
        first = image * 3 * source_plane + _reflect(x, width)
        source = _reflected_lines(first, y, height, width)

    red = _difference(prediction, target, source, valid)
    green = _difference(prediction + source_plane, target + source_plane, source, valid)
    blue = _difference(prediction + 2 * source_plane, target + 2 * source_plane, source, valid)

    scale = 1.0
    if timestep_weight is not None:
        scale = tl.load(timestep_weight + image, mask=valid, other=0)
    squares = 0.0
    for i in tl.static_range(8):
        row = red[i] * red[i] + green[i] * green[i] + blue[i] * blue[i]
        if PADDED:
            row = tl.where((y + i < height) & (x < width), row, 0)
        squares += row
    tl.store(partials + program, tl.sum(scale * squares))

    squares_y, gradient_y = _frequency(_mix(YR, red, YG, green, YB, blue), table, valid)
    squares_b, gradient_b = _frequency(_mix(BR, red, BG, green, BB, blue), table + 64, valid)
    squares_r, gradient_r = _frequency(_mix(RR, red, RG, green, RB, blue), table + 128, valid)
    tl.store(partials + programs + program, tl.sum(squares_y + squares_b + squares_r))

    if gradient is not None:
        scale *= difference_scale
        red_gradient = _mix(YR, gradient_y, BR, gradient_b, RR, gradient_r)
        green_gradient = _mix(YG, gradient_y, BG, gradient_b, RG, gradient_r)
        blue_gradient = _mix(YB, gradient_y, BB, gradient_b, RB, gradient_r)
        for i in tl.static_range(8):
            row_scale = scale
            if PADDED:
                row_scale = tl.where((y + i < height) & (x < width), scale, 0)
            row = gradient + place + i * stride
            tl.store(row, row_scale * red[i] + frequency_scale * red_gradient[i], mask=valid)
            row += plane
            tl.store(row, row_scale * green[i] + frequency_scale * green_gradient[i], mask=valid)
            row += plane
            tl.store(row, row_scale * blue[i] + frequency_scale * blue_gradient[i], mask=valid)


@triton.jit(do_not_specialize=["programs"])
def mean_kernel(
    partials,  # (2, programs) float32
    total,
    flow_matching,
    frequency,
    programs,
    values,  # number of pixel values
    coefficients,  # number of coefficients
    weight,
    STEP: tl.constexpr,
):
    index = tl.arange(0, STEP)
    squares = tl.zeros((STEP,), tl.float64)
    weighted = tl.zeros((STEP,), tl.float64)
    for start in range(0, programs, STEP):
        valid = start + index < programs
        place = partials + start + index
        squares += tl.load(place, mask=valid, other=0).to(tl.float64)
        weighted += tl.load(place + programs, mask=valid, other=0).to(tl.float64)
    mean_squares = tl.sum(squares) / values
    mean_weighted = tl.sum(weighted) / coefficients
    tl.store(flow_matching, mean_squares)
    tl.store(frequency, mean_weighted)
    tl.store(total, mean_squares + weight * mean_weighted)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(values, factor, size, STEP: tl.constexpr):
    scale = tl.load(factor)
    # A training step asks for the gradient of the loss itself: then there is nothing to do, and the
    # GPU finds that out without the host waiting for it.
    if scale != 1:
        place = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
        value = tl.load(values + place, mask=place < size).to(tl.float32)
        tl.store(values + place, (value * scale).to(values.dtype.element_ty), mask=place < size)


def forward(
    prediction: Tensor,
    target: Tensor,
    table: Tensor,
    weight: float,
    timestep_weight: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `deco_fast.kernels.registration`.

    Raises:
        ValueError: shapes do not fit.
    """
    batch, channels, height, width = prediction.shape
    expect(prediction, (batch, 3, height, width), "prediction")
    expect(target, prediction.shape, "target")
    expect(table, (3, BLOCK, BLOCK), "table")
    if timestep_weight is not None:
        expect(timestep_weight, (batch,), "timestep_weight")
    rows, columns = triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK)
    blocks = batch * rows * columns
    programs = max(triton.cdiv(blocks, LOSS_LAUNCH["BLOCKS"]), 1)
    values, coefficients = prediction.numel(), blocks * channels * BLOCK**2
    padded = values != coefficients

    partials = prediction.new_empty((2, programs), dtype=torch.float32)
    total, flow_matching, frequency = (
        prediction.new_empty((), dtype=torch.float32) for _ in range(3)
    )
    gradient = None
    if with_gradient:
        gradient = prediction.new_empty(
            (batch, channels, rows * BLOCK, columns * BLOCK),
            dtype=torch.float32 if padded else loss_gradient_dtype(prediction),
        )
    with torch.cuda.device_of(prediction):
        loss_kernel[(programs,)](
            prediction.contiguous(),
            target.contiguous(),
            table.float().contiguous(),
            None if timestep_weight is None else timestep_weight.float().contiguous(),
            partials,
            gradient,
            height,
            width,
            rows,
            columns,
            blocks,
            2 / max(values, 1),
            2 * weight / max(coefficients, 1),
            PADDED=padded,
            **LOSS_LAUNCH,
        )
        mean_kernel[(1,)](
            *(partials, total, flow_matching, frequency),
            *(programs, float(values), float(coefficients), weight),
            **MEAN_LAUNCH,
        )
    if gradient is None:
        gradient = prediction.new_empty(0, dtype=loss_gradient_dtype(prediction))
    elif padded:
        gradient = _fold(gradient, height, width).to(loss_gradient_dtype(prediction)).contiguous()
    return total, flow_matching, frequency, gradient


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient (contiguous) multiplied by a scalar on its device, in place."""
    with torch.cuda.device_of(gradient):
        scale_kernel[(triton.cdiv(gradient.numel(), SCALE_LAUNCH["STEP"]),)](
            gradient, factor.float(), gradient.numel(), **SCALE_LAUNCH
        )
    return gradient


def _fold(gradient: Tensor, height: int, width: int) -> Tensor:
    """Add the gradient of each reflected pixel to that of the pixel it repeats, in a fixed order.

    Blocks share these pixels, so the pass over the blocks cannot do it without atomic additions.
    """
    for dim, size in ((2, height), (3, width)):
        period = max(2 * (size - 1), 1)
        for place in range(size, gradient.shape[dim]):
            source = min(place % period, period - place % period, size - 1)
            gradient.select(dim, source).add_(gradient.select(dim, place))
        gradient = gradient.narrow(dim, 0, size)
    return gradient


def specialisations(capability: int) -> Iterator[Specialisation]:
    """What `forward` launches, the same for every capability."""
    pairs = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"))
    for (prediction, target), padded, full in itertools.product(
        pairs, (False, True), (True, False)
    ):
        pointers = {"prediction": prediction, "target": target, "table": "fp32", "partials": "fp32"}
        if full:
            keeps = prediction if prediction != "fp16" and not padded else "fp32"
            pointers |= {"timestep_weight": "fp32", "gradient": keeps}
        sizes = ("height", "width", "block_rows", "block_columns", "blocks")
        scales = ("difference_scale", "frequency_scale")
        yield Specialisation(
            name=f"flow_matching_loss {prediction} and {target}"
            f"{', padded' if padded else ''}{', weights and gradient' if full else ''}",
            kernel=loss_kernel,
            types={name: f"*{dtype}" for name, dtype in pointers.items()}
            | dict.fromkeys(sizes, "i32")
            | dict.fromkeys(scales, "fp32"),
            constants={"PADDED": padded, "BLOCKS": LOSS_LAUNCH["BLOCKS"]}
            | ({} if full else {"timestep_weight": None, "gradient": None}),
            num_warps=LOSS_LAUNCH["num_warps"],
        )
    for dtype in ("fp32", "bf16"):
        yield Specialisation(
            name=f"flow_matching_loss scale {dtype}",
            kernel=scale_kernel,
            types={"values": f"*{dtype}", "factor": "*fp32", "size": "i32"},
            constants={"STEP": SCALE_LAUNCH["STEP"]},
            num_warps=SCALE_LAUNCH["num_warps"],
        )
    yield Specialisation(
        name="flow_matching_loss mean",
        kernel=mean_kernel,
        types=dict.fromkeys(("partials", "total", "flow_matching", "frequency"), "*fp32")
        | {"programs": "i32", "values": "fp32", "coefficients": "fp32", "weight": "fp32"},
        constants={"STEP": MEAN_LAUNCH["STEP"]},
        num_warps=MEAN_LAUNCH["num_warps"],
    )
