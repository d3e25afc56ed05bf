"""Queries and keys normalised and rotated, values copied, in one pass (Triton).

    r = 1 / √(mean(x²) + eps),   n = r · x,   (y₂ⱼ, y₂ⱼ₊₁) = rotation(θⱼ) · (w n)₂ⱼ, (w n)₂ⱼ₊₁

The backward pass turns the gradient back by −θ to g, and with r and n computed again

    ∂x = r · (w g − n · mean(w g n)),   ∂w = Σ g n

over all tokens and heads. It writes the gradient of the linear layer's whole result at once, that
of the values included. Each program adds up its own part of ∂w: no atomics.

A row is one head of one token, and rows follow each other as in the linear layer's result. Channels
are loaded as they lie and split into pairs inside of a thread.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_fast.kernels.shapes import expect
from deco_fast.kernels.specialisation import Specialisation

LAUNCH: Final = {"ROWS": 32, "num_warps": 4, "num_stages": 1}
PROGRAMS: Final = 512
"""Of the backward pass, for queries, keys and values each: partial sums for the weights."""


@triton.jit
def _split(x, D: tl.constexpr):
    """Even and odd columns of (rows, D)."""
    return tl.split(x.reshape(x.shape[0], D // 2, 2))


@triton.jit
def _join(even, odd, D: tl.constexpr):
    return tl.join(even, odd).reshape(even.shape[0], D)


@triton.jit
def _load_rotation(rotary, token, tokens, mask, d, D: tl.constexpr):
    """cos and sin of a row's pairs, (rows, D/2); the table's pairs lie side by side as well."""
    place = rotary + (token % tokens * d)[:, None] + tl.arange(0, D)[None, :]
    return _split(tl.load(place, mask=mask, other=0), D)


@triton.jit
def _normalise(x, d, eps):
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / d + eps)[:, None]
    return x * rstd, rstd


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def forward_kernel(
    qkv,  # (B·L, 3, H, d)
    q_weight,  # (d,) float32
    k_weight,
    rotary,  # (L, d/2, 2) float32
    q,  # (B·L, H, d)
    k,
    v,
    rows,  # B·L·H
    tokens,  # L
    heads,  # H
    eps,
    d: tl.constexpr,
    D: tl.constexpr,  # d to the next power of two
    ROWS: tl.constexpr,
):
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    mask = (row < rows)[:, None] & (column < d)[None, :]
    token = row // heads
    source = (token * 3 + part) * heads + row % heads
    place = row[:, None] * d + column[None, :]
    x = tl.load(qkv + source[:, None] * d + column[None, :], mask=mask, other=0)
    if part == 2:
        tl.store(v + place, x, mask=mask)
    else:
        weight = q_weight
        target = q
        if part == 1:
            weight = k_weight
            target = k
        n, _ = _normalise(x.to(tl.float32), d, eps)
        n *= tl.load(weight + column, mask=column < d, other=0)[None, :]
        even, odd = _split(n, D)
        cos, sin = _load_rotation(rotary, token, tokens, mask, d, D)
        turned = _join(even * cos - odd * sin, even * sin + odd * cos, D)
        tl.store(target + place, turned.to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def backward_kernel(
    grad_q,  # (B·L, H, d)
    grad_k,
    grad_v,
    qkv,  # (B·L, 3, H, d)
    q_weight,  # (d,) float32
    k_weight,
    rotary,  # (L, d/2, 2) float32
    grad_qkv,  # (B·L, 3, H, d)
    partials,  # (2, D, programs) float32: sums for q_weight and k_weight
    rows,
    tokens,
    heads,
    eps,
    d: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    program, programs, part = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    column = tl.arange(0, D)
    weight = q_weight
    grad = grad_q
    if part == 1:
        weight = k_weight
        grad = grad_k
    if part == 2:
        grad = grad_v
    w = tl.load(weight + column, mask=column < d, other=0)[None, :]
    sums = tl.zeros((ROWS, D), tl.float32)
    for index in range(0, tl.cdiv(tl.cdiv(rows, ROWS) - program, programs)):
        row = (program + index * programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < d)[None, :]
        token = row // heads
        source = (token * 3 + part) * heads + row % heads
        place = source[:, None] * d + column[None, :]
        g = tl.load(grad + row[:, None] * d + column[None, :], mask=mask, other=0)
        if part < 2:
            cos, sin = _load_rotation(rotary, token, tokens, mask, d, D)
            even, odd = _split(g.to(tl.float32), D)
            back = _join(even * cos + odd * sin, odd * cos - even * sin, D)
            x = tl.load(qkv + place, mask=mask, other=0).to(tl.float32)
            n, rstd = _normalise(x, d, eps)
            sums += back * n
            back *= w
            grad_x = rstd * (back - n * (tl.sum(back * n, axis=1) / d)[:, None])
            tl.store(grad_qkv + place, grad_x.to(g.dtype), mask=mask)
        else:
            tl.store(grad_qkv + place, g, mask=mask)
    if part < 2:
        tl.store(partials + (part * D + column) * programs + program, tl.sum(sums, axis=0))


def _sizes(qkv: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """d, H, and the number of rows."""
    head_size = len(weight)
    heads = qkv.shape[-1] // (3 * head_size)
    return head_size, heads, qkv.shape[0] * qkv.shape[1] * heads


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `deco_fast.kernels.registration`.

    Raises:
        ValueError: shapes do not fit.
    """
    head_size, heads, rows = _sizes(qkv, q_weight)
    batch, tokens, _ = qkv.shape
    expect(qkv, (batch, tokens, 3 * heads * head_size), "qkv")
    expect(k_weight, (head_size,), "k_weight")
    expect(rotary, (tokens, head_size // 2, 2), "rotary")
    q, k, v = (qkv.new_empty((batch, tokens, heads, head_size)) for _ in range(3))
    if rows == 0:
        return q, k, v
    with torch.cuda.device_of(qkv):
        forward_kernel[(triton.cdiv(rows, LAUNCH["ROWS"]), 3)](
            qkv.contiguous(),
            q_weight.float().contiguous(),
            k_weight.float().contiguous(),
            rotary.float().contiguous(),
            *(q, k, v, rows, tokens, heads, eps),
            d=head_size,
            D=triton.next_power_of_2(head_size),
            **LAUNCH,
        )
    return q, k, v


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rotary: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `deco_fast.kernels.registration`; the same bits at every run."""
    head_size, heads, rows = _sizes(qkv, q_weight)
    padded = triton.next_power_of_2(head_size)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    programs = min(PROGRAMS, triton.cdiv(rows, LAUNCH["ROWS"]))
    # The programs innermost, so that the sums below read memory in order.
    partials = qkv.new_empty((2, padded, programs), dtype=torch.float32)
    if rows > 0:
        with torch.cuda.device_of(qkv):
            backward_kernel[(programs, 3)](
                grad_q.contiguous(),
                grad_k.contiguous(),
                grad_v.contiguous(),
                qkv.contiguous(),
                q_weight.float().contiguous(),
                k_weight.float().contiguous(),
                rotary.float().contiguous(),
                *(grad_qkv, partials, rows, qkv.shape[1], heads, eps),
                d=head_size,
                D=padded,
                **LAUNCH,
            )
    grad_q_weight, grad_k_weight = (
        part[:head_size].sum(1).to(weight.dtype)
        for part, weight in zip(partials, (q_weight, k_weight), strict=True)
    )
    return grad_qkv, grad_q_weight, grad_k_weight


_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def specialisations(capability: int) -> Iterator[Specialisation]:
    """What `forward` and `backward` launch for the heads of our models."""
    for dtype, head_size in itertools.product(_TRITON_TYPES, (32, 64, 72)):
        constants = {
            "d": head_size,
            "D": triton.next_power_of_2(head_size),
            "ROWS": LAUNCH["ROWS"],
        }
        for direction, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
            yield Specialisation(
                f"qk_norm_rope_{direction} {_TRITON_TYPES[dtype]} d={head_size}",
                kernel,
                _types(kernel, dtype) | {"eps": "fp32"},
                constants,
                num_warps=LAUNCH["num_warps"],
            )


def _types(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    float32 = ("q_weight", "k_weight", "rotary", "partials")
    types = {name: f"*{_TRITON_TYPES[dtype]}" for name in kernel.arg_names}
    types |= {name: "*fp32" for name in float32 if name in types}
    types |= dict.fromkeys(("rows", "tokens", "heads"), "i32")
    return {name: kind for name, kind in types.items() if name not in ("eps", "d", "D", "ROWS")}
