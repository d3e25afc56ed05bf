"""RMSNorm and modulation in one pass, and their gradients in two (Triton).

    r = 1 / √(mean(x²) + eps),   n = r · x,   y = n · w (1 + scale) + shift

With g = ∂y, and sums over the tokens of an image,

    ∂x     = r · (a − n · mean(a n)),   a = w (1 + scale) g
    ∂shift = Σ g,   ∂scale = w Σ g n,   ∂w = Σ over images (1 + scale) Σ g n

A program of the backward pass takes some tokens of one image and leaves the two sums over them;
a second launch adds these up in a fixed order: no atomics, the same bits at every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_fast.kernels.shapes import expect
from deco_fast.kernels.specialisation import Specialisation

TOKENS: Final = 8
"""That a program of the backward pass takes."""
REDUCE_LAUNCH: Final = {"COLUMNS": 32, "CHUNKS": 32, "num_warps": 4, "num_stages": 1}


def _warps(width: int) -> int:
    return 8 if width > 2048 else 4


@triton.jit
def _normalise(x, width, eps):
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    return x * rstd, rstd


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    x,  # (B, L, D)
    weight,  # (D,) float32
    shift,  # (B, D)
    scale,  # (B, D)
    y,  # (B, L, D)
    tokens,  # L
    eps,
    WIDTH: tl.constexpr,  # D
    PADDED: tl.constexpr,  # D to the next power of two
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    mask = column < WIDTH
    image = row // tokens * WIDTH + column
    value = tl.load(x + row * WIDTH + column, mask=mask, other=0)
    n, _ = _normalise(value.to(tl.float32), WIDTH, eps)
    factor = 1 + tl.load(scale + image, mask=mask, other=0).to(tl.float32)
    factor *= tl.load(weight + column, mask=mask, other=0)
    result = n * factor + tl.load(shift + image, mask=mask, other=0).to(tl.float32)
    tl.store(y + row * WIDTH + column, result.to(value.dtype), mask=mask)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def backward_kernel(
    grad,  # (B, L, D)
    x,  # (B, L, D)
    weight,  # (D,) float32
    scale,  # (B, D)
    grad_x,  # (B, L, D)
    partials,  # (B, chunks, 2, D) float32: Σ g and Σ g n of the program's tokens
    tokens,
    chunks,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, PADDED)
    mask = column < WIDTH
    factor = 1 + tl.load(scale + image * WIDTH + column, mask=mask, other=0).to(tl.float32)
    factor *= tl.load(weight + column, mask=mask, other=0)
    shift_sums = tl.zeros((PADDED,), tl.float32)
    scale_sums = tl.zeros((PADDED,), tl.float32)
    first = chunk * TOKENS
    place = (image * tokens + first) * WIDTH + column
    next_g = tl.load(grad + place, mask=mask, other=0)
    next_x = tl.load(x + place, mask=mask, other=0)
    for token in range(first, tl.minimum(first + TOKENS, tokens)):
        g, n = next_g.to(tl.float32), next_x.to(tl.float32)
        # The next token's values are on their way while this one's are added up.
        later = place + WIDTH
        exists = column < tl.where(token + 1 < tl.minimum(first + TOKENS, tokens), WIDTH, 0)
        next_g = tl.load(grad + later, mask=exists, other=0)
        next_x = tl.load(x + later, mask=exists, other=0)
        n, rstd = _normalise(n, WIDTH, eps)
        shift_sums += g
        scale_sums += g * n
        g *= factor
        mean = tl.sum(g * n, axis=0) / WIDTH
        result = rstd * g - n * (rstd * mean)
        tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=mask)
        place = later
    out = partials + (image * chunks + chunk) * 2 * WIDTH + column
    tl.store(out, shift_sums, mask=mask)
    tl.store(out + WIDTH, scale_sums, mask=mask)


@triton.jit(do_not_specialize=["chunks"])
def reduce_kernel(
    partials,  # (B, chunks, 2, D) float32
    weight,  # (D,) float32
    scale,  # (B, D)
    weight_sums,  # (B, D) float32: of each image, the gradient of the weight
    grad_shift,  # (B, D)
    grad_scale,  # (B, D)
    chunks,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < WIDTH
    shift_sums = tl.zeros((CHUNKS, COLUMNS), tl.float32)
    scale_sums = tl.zeros((CHUNKS, COLUMNS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        place = partials + ((image * chunks + chunk) * 2 * WIDTH)[:, None] + column[None, :]
        exists = (chunk < chunks)[:, None] & mask[None, :]
        shift_sums += tl.load(place, mask=exists, other=0)
        scale_sums += tl.load(place + WIDTH, mask=exists, other=0)
    out = image * WIDTH + column
    shift_sum, scale_sum = tl.sum(shift_sums, axis=0), tl.sum(scale_sums, axis=0)
    tl.store(grad_shift + out, shift_sum.to(grad_shift.dtype.element_ty), mask=mask)
    w = tl.load(weight + column, mask=mask, other=0)
    tl.store(grad_scale + out, (w * scale_sum).to(grad_scale.dtype.element_ty), mask=mask)
    factor = 1 + tl.load(scale + out, mask=mask, other=0).to(tl.float32)
    tl.store(weight_sums + out, factor * scale_sum, mask=mask)


def forward(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """See `deco_fast.kernels.registration`.

    Raises:
        ValueError: shapes do not fit.
    """
    batch, tokens, width = x.shape
    expect(weight, (width,), "weight")
    expect(shift, (batch, 1, width), "shift")
    expect(scale, (batch, 1, width), "scale")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        with torch.cuda.device_of(x):
            forward_kernel[(batch * tokens,)](
                x.contiguous(),
                weight.float().contiguous(),
                shift.contiguous(),
                scale.contiguous(),
                *(y, tokens, eps),
                WIDTH=width,
                PADDED=triton.next_power_of_2(width),
                num_warps=_warps(width),
                num_stages=1,
            )
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `deco_fast.kernels.registration`; the same bits at every run."""
    batch, tokens, width = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight_sums = x.new_empty((batch, width), dtype=torch.float32)
    grad_shift, grad_scale = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (shift, scale)
    )
    if tokens == 0:
        for sums in (weight_sums, grad_shift, grad_scale):
            sums.zero_()
    elif batch > 0:
        chunks = triton.cdiv(tokens, TOKENS)
        partials = x.new_empty((batch, chunks, 2, width), dtype=torch.float32)
        weight32, scale = weight.float().contiguous(), scale.contiguous()
        with torch.cuda.device_of(x):
            backward_kernel[(chunks, batch)](
                *(grad.contiguous(), x.contiguous(), weight32, scale),
                *(grad_x, partials, tokens, chunks, eps),
                WIDTH=width,
                PADDED=triton.next_power_of_2(width),
                TOKENS=TOKENS,
                num_warps=_warps(width),
                num_stages=1,
            )
            reduce_kernel[(triton.cdiv(width, REDUCE_LAUNCH["COLUMNS"]), batch)](
                *(partials, weight32, scale, weight_sums, grad_shift, grad_scale, chunks),
                WIDTH=width,
                **REDUCE_LAUNCH,
            )
    return grad_x, weight_sums.sum(0).to(weight.dtype), grad_shift, grad_scale


_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def specialisations(capability: int) -> Iterator[Specialisation]:
    """What `forward` and `backward` launch for the widths of our models."""
    for dtype, width in itertools.product(_TRITON_TYPES.values(), (128, 1024, 1152, 1536)):
        padded = {"WIDTH": width, "PADDED": triton.next_power_of_2(width)}
        values, float32 = f"*{dtype}", "*fp32"
        modulation = {"weight": float32, "scale": values}
        name = f"{dtype} D={width}"
        yield Specialisation(
            f"norm_modulate_forward {name}",
            forward_kernel,
            dict.fromkeys(("x", "shift", "y"), values)
            | modulation
            | {"tokens": "i32", "eps": "fp32"},
            padded,
            num_warps=_warps(width),
        )
        yield Specialisation(
            f"norm_modulate_backward {name}",
            backward_kernel,
            dict.fromkeys(("grad", "x", "grad_x"), values)
            | modulation
            | {"partials": float32, "tokens": "i32", "chunks": "i32", "eps": "fp32"},
            padded | {"TOKENS": TOKENS},
            num_warps=_warps(width),
        )
        yield Specialisation(
            f"norm_modulate_reduce {name}",
            reduce_kernel,
            modulation
            | {"partials": float32, "weight_sums": float32, "chunks": "i32"}
            | {"grad_shift": values, "grad_scale": values},
            {"WIDTH": width, **{key: REDUCE_LAUNCH[key] for key in ("COLUMNS", "CHUNKS")}},
            num_warps=REDUCE_LAUNCH["num_warps"],
        )
