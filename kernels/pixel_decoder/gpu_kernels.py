"""The per-pixel part of the decoder on a GPU, forward and backward (Triton).

With c = silu(y), n the normalised residual h, and the affine part of the LayerNorm folded into the
modulation, a block is

    z = n · scale(c) + shift(c),   u = silu(fc1(z)),   h ← h + gate(c) · fc2(u)

and one pixel needs no other, so a tile of pixels passes through all blocks without leaving the
registers. Pixels are the rows of every product: its result is then laid out like the left operand
of the next. Only operands of products have the dtype of y; residual, norm and sums are float32.

A tile is a run of pixels in y's order (patch, then pixel inside the patch). A launch is given the
tiles from `first` to `end`, and a program takes every `programs`-th of them. As the host makes
`programs` and `first` multiples of the tiles in a patch, a program's tiles lie at the same place of
their patches: it holds its rows of the position table, and their gradient, in registers.

The backward pass is a launch for each block, the last one first, because the sums for the weights
of one block fill the registers. From launch to launch go the gradient of the residual (float32) and
what the blocks so far add to the gradient of y. A launch reads its block's input, which the forward
kernel wrote, except the first block's, which is made from the pixels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from deco_fast.kernels.pixel_decoder.reference import NORM_EPS

EPS = tl.constexpr(NORM_EPS)

COLORS = tl.constexpr(16)
"""Columns of the products with red, green and blue: tl.dot takes no fewer."""

MATRICES = tl.constexpr(5)
"""(C, C) matrices of a block, and vectors: scale, shift, gate, fc1, fc2."""

RGB = tl.constexpr(3)

VECTOR_ROWS = tl.constexpr(16)
"""Rows of an accumulator for vectors: tl.dot takes no fewer."""


@triton.jit
def _silu(x, APPROXIMATE: tl.constexpr):
    """silu(x) and the sigmoid of x, float32."""
    if APPROXIMATE:
        # One instruction, with a relative error of 2⁻¹¹; a half-precision operand has 2⁻⁹ or 2⁻¹¹.
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * tanh + half, 0.5 * tanh + 0.5
    else:
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid


@triton.jit
def _silu_derivative(silu, sigmoid):
    return sigmoid + silu * (1 - sigmoid)


@triton.jit
def _computed_once(x, APPROXIMATE: tl.constexpr):
    """Half-precision x, which the compiler must not compute again where another layout wants it."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return x


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _normalise(h):
    """LayerNorm without its affine part, and the reciprocal standard deviation."""
    C: tl.constexpr = h.shape[1]
    centred = h - (tl.sum(h, axis=1) * (1 / C))[:, None]
    variance = tl.sum(centred * centred, axis=1) * (1 / C)
    rstd = tl.rsqrt(variance + EPS)[:, None]
    return centred * rstd, rstd


@triton.jit
def _normalise_backward(grad_n, n, rstd):
    C: tl.constexpr = n.shape[1]
    mean = (tl.sum(grad_n, axis=1) * (1 / C))[:, None]
    projection = (tl.sum(grad_n * n, axis=1) * (1 / C))[:, None]
    return rstd * (grad_n - mean - n * projection)


@triton.jit
def _square(C: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a contiguous (C, COLUMNS) matrix."""
    return tl.arange(0, C)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _load_matrices(matrices, block, C: tl.constexpr):
    place = matrices + block * (MATRICES * C * C) + _square(C, C)
    return (
        tl.load(place),
        tl.load(place + C * C),
        tl.load(place + 2 * C * C),
        tl.load(place + 3 * C * C),
        tl.load(place + 4 * C * C),
    )


@triton.jit
def _load_vectors(vectors, block, C: tl.constexpr):
    place = vectors + block * (MATRICES * C) + tl.arange(0, C)[None, :]
    return (
        tl.load(place),
        tl.load(place + C),
        tl.load(place + 2 * C),
        tl.load(place + 3 * C),
        tl.load(place + 4 * C),
    )


@triton.jit
def _affine(a, matrices, vectors, k: tl.constexpr):
    return _product(a, matrices[k]) + vectors[k]


@triton.jit
def _modulate(n, condition, matrices, vectors):
    """The scale, and the input z of a block's MLP."""
    scale = _affine(condition, matrices, vectors, 0)
    # One tile less to hold than shift by itself.
    z = tl.dot(condition, matrices[1], n * scale + vectors[1], input_precision="ieee")
    return scale, z.to(condition.dtype)


@triton.jit
def _block(h, condition, matrices, vectors, APPROXIMATE: tl.constexpr):
    n, _ = _normalise(h)
    _, z = _modulate(n, condition, matrices, vectors)
    a = _affine(z, matrices, vectors, 3)
    u = _silu(a, APPROXIMATE)[0].to(condition.dtype)
    return h + _affine(u, matrices, vectors, 4) * _affine(condition, matrices, vectors, 2)


@triton.jit
def _place(tile, num_patches, patches, patch_columns, P: tl.constexpr, BLOCK: tl.constexpr):
    """Where a tile's pixels lie: offsets into channel 0 of (B, 3, H, W), and which exist."""
    AREA: tl.constexpr = P * P
    row = tl.arange(0, BLOCK)
    if BLOCK <= AREA:
        patch = tile // (AREA // BLOCK)
        pixel = tile % (AREA // BLOCK) * BLOCK + row
        exists = row < BLOCK
    else:
        patch = tile * (BLOCK // AREA) + row // AREA
        pixel = row % AREA
        exists = patch < num_patches
    image = (patch // patches).to(tl.int64)
    y = patch % patches // patch_columns * P + pixel // P
    x = patch % patches % patch_columns * P + pixel % P
    return image * (3 * AREA * patches) + (y * (patch_columns * P) + x), exists


@triton.jit
def _load_colors(x, offset, exists, plane):
    """Red, green and blue of a tile's pixels, float32."""
    red = tl.load(x + offset, mask=exists, other=0).to(tl.float32)
    green = tl.load(x + offset + plane, mask=exists, other=0).to(tl.float32)
    blue = tl.load(x + offset + 2 * plane, mask=exists, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _embed(colors, rgb_vectors, table_tile, C: tl.constexpr):
    """The decoder's input projections, folded: table + rgb_weight · (red, green, blue)."""
    channel = rgb_vectors + tl.arange(0, C)[None, :]
    h = table_tile
    for k in tl.static_range(3):
        h += colors[k][:, None] * tl.load(channel + k * C)
    return h


@triton.jit
def _load_table_tile(table, tile, AREA: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    pixel = (tile * BLOCK + tl.arange(0, BLOCK)) % AREA
    return tl.load(table + pixel[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def _rows(tile, BLOCK: tl.constexpr, C: tl.constexpr):
    """Offsets of a tile of (pixels, C)."""
    return tile.to(tl.int64) * (BLOCK * C) + _square(BLOCK, C)


@triton.jit
def _load_condition(y, tile, exists, BLOCK: tl.constexpr, C: tl.constexpr):
    """A tile of y."""
    return tl.load(y + _rows(tile, BLOCK, C), mask=exists[:, None], other=0)


@triton.jit
def _activate(y, APPROXIMATE: tl.constexpr):
    """The condition silu(y) in the dtype of y."""
    condition, _ = _silu(y.to(tl.float32), APPROXIMATE)
    return condition.to(y.dtype)


@triton.jit(do_not_specialize=["first", "end", "num_patches", "patches", "patch_columns"])
def forward_kernel(
    x,  # (B, 3, H, W)
    y,  # (B·L, p², C), the condition before SiLU
    velocity,  # (B, 3, H, W), or None
    inputs,  # (blocks - 1, pixels of this launch, C), dtype of y: what blocks 1, 2, … get; or None
    matrices,  # (blocks, 5, C, C), (in, out), dtype of y
    vectors,  # (blocks, 5, C) float32
    output_matrix,  # (C, 16), dtype of y
    output_vector,  # (16,) float32
    rgb_vectors,  # (3, C) float32
    table,  # (p², C) float32
    first,
    end,
    num_patches,  # B·L
    patches,  # L
    patch_columns,  # W/p
    NUM_BLOCKS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels in a tile
    HOIST: tl.constexpr,  # keep all matrices loaded
    APPROXIMATE: tl.constexpr,
):
    """The velocity of the pixels, and their residuals between blocks."""
    programs = tl.num_programs(0)
    start = first + tl.program_id(0)
    plane = patches.to(tl.int64) * (P * P)
    color = tl.arange(0, COLORS)
    # A tile of the position table stays in registers where these are many enough.
    HOIST_TABLE: tl.constexpr = C < 64 and y.dtype.element_ty != tl.float32
    if HOIST_TABLE:
        table_tile = _load_table_tile(table, start, P * P, BLOCK, C)
    if velocity is not None:
        output = tl.load(output_matrix + _square(C, COLORS))
        output_bias = tl.load(output_vector + color)[None, :]
    if inputs is not None:
        # Counted from the launch's first pixel, and up to the last that exists.
        pixels = tl.minimum(num_patches.to(tl.int64) * (P * P), end.to(tl.int64) * BLOCK)
        input_size = (pixels - first.to(tl.int64) * BLOCK) * C
    hoisted = ()
    if HOIST:
        for block in tl.static_range(NUM_BLOCKS):
            hoisted = hoisted + (_load_matrices(matrices, block, C),)  # noqa: RUF005 Triton's way

    # What the next tile needs is on its way while this one is computed, where there are registers
    # for it.
    AHEAD: tl.constexpr = y.dtype.element_ty != tl.float32
    if AHEAD:
        offset, exists = _place(start, num_patches, patches, patch_columns, P, BLOCK)
        exists &= start < end
        next_colors = _load_colors(x, offset, exists, plane)
        next_y = _load_condition(y, start, exists, BLOCK, C)
    for index in range(0, tl.cdiv(end - start, programs)):
        tile = start + index * programs
        if AHEAD:
            colors, condition = next_colors, _activate(next_y, APPROXIMATE)
            later = tile + programs
            offset, exists = _place(later, num_patches, patches, patch_columns, P, BLOCK)
            exists &= later < end
            next_colors = _load_colors(x, offset, exists, plane)
            next_y = _load_condition(y, later, exists, BLOCK, C)
        offset, exists = _place(tile, num_patches, patches, patch_columns, P, BLOCK)
        if not AHEAD:
            colors = _load_colors(x, offset, exists, plane)
            condition = _activate(_load_condition(y, tile, exists, BLOCK, C), APPROXIMATE)
        if not HOIST_TABLE:
            table_tile = _load_table_tile(table, tile, P * P, BLOCK, C)
        h = _embed(colors, rgb_vectors, table_tile, C)
        # Without a velocity, the last block's result is of no use.
        BLOCKS: tl.constexpr = NUM_BLOCKS if velocity is not None else NUM_BLOCKS - 1
        place = _rows(tile - first, BLOCK, C)
        if HOIST:
            for block in tl.static_range(BLOCKS):
                h = _block(
                    h, condition, hoisted[block], _load_vectors(vectors, block, C), APPROXIMATE
                )
                if inputs is not None and block < NUM_BLOCKS - 1:
                    next_inputs = inputs + block * input_size
                    tl.store(next_inputs + place, h.to(condition.dtype), mask=exists[:, None])
        else:
            # Not unrolled: the compiler would load weights far ahead, into registers it lacks.
            for block in range(BLOCKS):
                block_matrices = _load_matrices(matrices, block, C)
                h = _block(
                    h, condition, block_matrices, _load_vectors(vectors, block, C), APPROXIMATE
                )
                if inputs is not None:
                    next_inputs = inputs + block * input_size
                    is_input = exists[:, None] & (block < NUM_BLOCKS - 1)
                    tl.store(next_inputs + place, h.to(condition.dtype), mask=is_input)
        if velocity is not None:
            n, _ = _normalise(h)
            result = _product(n.to(condition.dtype), output) + output_bias
            tl.store(
                velocity + offset[:, None] + color[None, :] * plane,
                result.to(velocity.dtype.element_ty),
                mask=exists[:, None] & (color < 3)[None, :],
            )


@triton.jit
def _add_outer(sums, a, b):
    """sums + aᵀ b: where b is the gradient of a · matrix, that of the matrix."""
    return tl.dot(tl.trans(a), b, sums, input_precision="ieee")


@triton.jit
def _add_to_row(sums, row: tl.constexpr, b):
    """sums with Σ b added to one row: where b is the gradient of … + vector, that of the vector."""
    here = tl.arange(0, VECTOR_ROWS)[:, None] == row
    if b.dtype == tl.float32:
        sums += tl.where(here, tl.sum(b, axis=0)[None, :], 0)
    else:
        # A product, where a reduction would make all threads exchange data.
        ones = tl.full((VECTOR_ROWS, b.shape[0]), 1, b.dtype)
        sums = tl.dot(tl.where(here, ones, tl.zeros_like(ones)), b, sums)
    return sums


@triton.jit
def _add_affine(matrix_sums, vector_sums, row: tl.constexpr, a, b):
    return _add_outer(matrix_sums, a, b), _add_to_row(vector_sums, row, b)


@triton.jit
def _row_sums_place(rows: tl.constexpr, C: tl.constexpr):
    """Offsets of a small accumulator, and which of its rows are in use."""
    return _square(VECTOR_ROWS, C), tl.arange(0, VECTOR_ROWS)[:, None] < rows


@triton.jit
def _load_row_sums(place, rows: tl.constexpr, C: tl.constexpr, continued):
    offset, used = _row_sums_place(rows, C)
    return tl.load(place + offset, mask=used & continued, other=0)


@triton.jit
def _store_row_sums(place, sums, rows: tl.constexpr, C: tl.constexpr):
    offset, used = _row_sums_place(rows, C)
    tl.store(place + offset, sums, mask=used)


@triton.jit(
    do_not_specialize=[
        "partial_size",
        "block",
        "first",
        "end",
        "num_patches",
        "patches",
        "patch_columns",
    ]
)
def backward_kernel(
    grad_velocity,  # (B, 3, H, W); None but for the last block
    x,  # (B, 3, H, W); None but for the first block
    y,  # (B·L, p², C)
    inputs,  # (pixels of this launch, C), of this block; None for the first
    matrices,  # as in forward_kernel, up to `table`
    vectors,
    output_matrix,
    rgb_vectors,
    table,
    grad_x,  # (B, 3, H, W), or None
    grad_y,  # (B·L, p², C)
    grad_h,  # scratch (tiles of this launch, BLOCK, C) float32; None for a single block
    partials,  # (programs, partial_size) float32: output, colours, table, blocks
    partial_size,
    block,
    first,
    end,
    num_patches,
    patches,
    patch_columns,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Gradients of one block; the first block's with the input projections, the last one's with the
    output. Those of weights are one sum for each program, continued from tiles before `first`."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start = first + program
    plane = patches.to(tl.int64) * (P * P)
    color = tl.arange(0, COLORS)
    dtype: tl.constexpr = y.dtype.element_ty
    block_matrices = _load_matrices(matrices, block, C)

    continued = first > 0
    partial = partials + program.to(tl.int64) * partial_size
    output_place = partial + COLORS
    rgb_place = output_place + RGB * C
    table_place = rgb_place + RGB * C
    own = table_place + BLOCK * C + block * (MATRICES * (C * C + C))
    square = _square(C, C)
    scale_sums = tl.load(own + square, mask=continued, other=0)
    shift_sums = tl.load(own + C * C + square, mask=continued, other=0)
    gate_sums = tl.load(own + 2 * C * C + square, mask=continued, other=0)
    fc1_sums = tl.load(own + 3 * C * C + square, mask=continued, other=0)
    fc2_sums = tl.load(own + 4 * C * C + square, mask=continued, other=0)
    vector_place = own + MATRICES * C * C
    vector_sums = _load_row_sums(vector_place, MATRICES, C, continued)
    if FIRST:
        rgb_sums = _load_row_sums(rgb_place, RGB, C, continued)
        table_sums = tl.load(table_place + _square(BLOCK, C), mask=continued, other=0)
    if LAST:
        output_sums = _load_row_sums(output_place, RGB, C, continued)
        # Added up over the pixels of a tile at the end, not for every tile.
        result_sums = tl.zeros((BLOCK, COLORS), tl.float32)
        output = tl.load(output_matrix + _square(C, COLORS))

    for index in range(0, tl.cdiv(end - start, programs)):
        tile = start + index * programs
        offset, exists = _place(tile, num_patches, patches, patch_columns, P, BLOCK)
        condition = _activate(_load_condition(y, tile, exists, BLOCK, C), APPROXIMATE)
        condition = _computed_once(condition, APPROXIMATE)
        own_rows = _rows(tile - first, BLOCK, C)
        if FIRST:
            table_tile = _load_table_tile(table, tile, P * P, BLOCK, C)
            h = _embed(_load_colors(x, offset, exists, plane), rgb_vectors, table_tile, C)
        else:
            h = tl.load(inputs + own_rows, mask=exists[:, None], other=0).to(tl.float32)
        block_vectors = _load_vectors(vectors, block, C)

        n, rstd = _normalise(h)
        scale, z = _modulate(n, condition, block_matrices, block_vectors)
        a = _affine(z, block_matrices, block_vectors, 3)
        silu, sigmoid = _silu(a, APPROXIMATE)
        u = _computed_once(silu.to(dtype), APPROXIMATE)
        derivative = _silu_derivative(silu, sigmoid)
        output_of_mlp = _affine(u, block_matrices, block_vectors, 4)
        gate = _affine(condition, block_matrices, block_vectors, 2)
        if LAST:
            last_n, last_rstd = _normalise(h + gate * output_of_mlp)
            grad_result = tl.load(
                grad_velocity + offset[:, None] + color[None, :] * plane,
                mask=exists[:, None] & (color < 3)[None, :],
                other=0,
            )
            result_sums += grad_result.to(tl.float32)
            grad_result = grad_result.to(dtype)
            output_sums = _add_outer(output_sums, grad_result, last_n.to(dtype))
            grad = _product(grad_result, tl.trans(output))
            grad = _normalise_backward(grad, last_n, last_rstd)
        else:
            grad = tl.load(grad_h + own_rows)

        grad_gate = (grad * output_of_mlp).to(dtype)
        grad_output = (grad * gate).to(dtype)
        fc2_sums, vector_sums = _add_affine(fc2_sums, vector_sums, 4, u, grad_output)
        grad_a = _product(grad_output, tl.trans(block_matrices[4]))
        grad_a = (grad_a * derivative).to(dtype)
        fc1_sums, vector_sums = _add_affine(fc1_sums, vector_sums, 3, z, grad_a)
        grad_z = _product(grad_a, tl.trans(block_matrices[3]))
        grad += _normalise_backward(grad_z * scale, n, rstd)

        grad_scale = (grad_z * n).to(dtype)
        grad_shift = grad_z.to(dtype)
        scale_sums, vector_sums = _add_affine(scale_sums, vector_sums, 0, condition, grad_scale)
        shift_sums, vector_sums = _add_affine(shift_sums, vector_sums, 1, condition, grad_shift)
        gate_sums, vector_sums = _add_affine(gate_sums, vector_sums, 2, condition, grad_gate)

        grad_condition = _product(grad_scale, tl.trans(block_matrices[0]))
        grad_condition += _product(grad_shift, tl.trans(block_matrices[1]))
        grad_condition += _product(grad_gate, tl.trans(block_matrices[2]))
        y_place = _rows(tile, BLOCK, C)
        if not LAST:
            later = tl.load(grad_y + y_place, mask=exists[:, None], other=0)
            grad_condition += later.to(tl.float32)
        if FIRST:
            # A second load, because the registers cannot hold y, and volatile to remain one.
            value = tl.load(y + y_place, mask=exists[:, None], other=0, volatile=True)
            silu, sigmoid = _silu(value.to(tl.float32), APPROXIMATE)
            grad_condition *= _silu_derivative(silu, sigmoid)
        tl.store(grad_y + y_place, grad_condition.to(dtype), mask=exists[:, None])

        if FIRST:
            table_sums += grad
            grad_embedding = grad.to(dtype)
            color_place = offset[:, None] + color[None, :] * plane
            color_exists = exists[:, None] & (color < 3)[None, :]
            colors = tl.load(x + color_place, mask=color_exists, other=0).to(dtype)
            rgb_sums = _add_outer(rgb_sums, colors, grad_embedding)
            if grad_x is not None:
                channel = rgb_vectors + tl.arange(0, C)[None, :]
                for k in tl.static_range(3):
                    grad_color = tl.sum(grad * tl.load(channel + k * C), axis=1)
                    tl.store(grad_x + offset + k * plane, grad_color, mask=exists)
        else:
            tl.store(grad_h + own_rows, grad)

    tl.store(own + square, scale_sums)
    tl.store(own + C * C + square, shift_sums)
    tl.store(own + 2 * C * C + square, gate_sums)
    tl.store(own + 3 * C * C + square, fc1_sums)
    tl.store(own + 4 * C * C + square, fc2_sums)
    _store_row_sums(vector_place, vector_sums, MATRICES, C)
    if FIRST:
        _store_row_sums(rgb_place, rgb_sums, RGB, C)
        tl.store(table_place + _square(BLOCK, C), table_sums)
    if LAST:
        _store_row_sums(output_place, output_sums, RGB, C)
        sums = tl.sum(result_sums, axis=0)
        sums += tl.load(partial + color, mask=continued & (color < COLORS), other=0)
        tl.store(partial + color, sums)
