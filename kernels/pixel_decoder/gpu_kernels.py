"""The per-pixel part of the decoder on a GPU, forward and backward (Triton).

With c = silu(y), n the normalised residual h, and the affine part of the LayerNorm folded into the
modulation, a block is

    z = n · scale(c) + shift(c),   u = silu(fc1(z)),   h ← h + gate(c) · fc2(u)

and one pixel needs no other, so a tile of pixels passes through all blocks without leaving the
registers. Pixels are the rows of every product: its result is then laid out like the left operand
of the next. Only operands of products have the dtype of y; residual, norm and sums are float32.

A tile is a run of pixels in y's order (patch, then pixel inside the patch). A program takes every
`programs`-th tile, and as the host makes that a multiple of the tiles in a patch, its tiles lie at
the same place of their patches: it holds its rows of the position table, and their gradient, in
registers.
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


@triton.jit
def _sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        # One instruction, with a relative error of 2⁻¹¹; a half-precision operand has 2⁻⁹ or 2⁻¹¹.
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * tanh + 0.5
    else:
        return tl.sigmoid(x)


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
    u = (a * _sigmoid(a, APPROXIMATE)).to(condition.dtype)
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
def _embed(x, offset, exists, plane, rgb_vectors, table_tile, C: tl.constexpr):
    """The decoder's input projections, folded: table + rgb_weight · (red, green, blue)."""
    channel = rgb_vectors + tl.arange(0, C)[None, :]
    h = table_tile
    for k in tl.static_range(3):
        color = tl.load(x + offset + k * plane, mask=exists, other=0).to(tl.float32)
        h += color[:, None] * tl.load(channel + k * C)
    return h


@triton.jit
def _load_table_tile(table, tile, AREA: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    pixel = (tile * BLOCK + tl.arange(0, BLOCK)) % AREA
    return tl.load(table + pixel[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def _condition(y, tile, exists, BLOCK: tl.constexpr, C: tl.constexpr, APPROXIMATE: tl.constexpr):
    """A tile's silu(y) in the dtype of y."""
    tile_start = tile.to(tl.int64) * (BLOCK * C)
    value = tl.load(y + tile_start + _square(BLOCK, C), mask=exists[:, None], other=0)
    value = value.to(tl.float32)
    return (value * _sigmoid(value, APPROXIMATE)).to(y.dtype.element_ty)


@triton.jit
def _silu_derivative(x, sigmoid):
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit(do_not_specialize=["num_tiles", "num_patches", "patches", "patch_columns"])
def forward_kernel(
    x,  # (B, 3, H, W)
    y,  # (B·L, p², C), the condition before SiLU
    velocity,  # (B, 3, H, W)
    matrices,  # (blocks, 5, C, C), (in, out), dtype of y
    vectors,  # (blocks, 5, C) float32
    output_matrix,  # (C, 16), dtype of y
    output_vector,  # (16,) float32
    rgb_vectors,  # (3, C) float32
    table,  # (p², C) float32
    num_tiles,
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
    """The velocity of all pixels."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    plane = patches.to(tl.int64) * (P * P)
    color = tl.arange(0, COLORS)
    output = tl.load(output_matrix + _square(C, COLORS))
    # A tile of the position table stays in registers where these are many enough.
    HOIST_TABLE: tl.constexpr = C < 64 and y.dtype.element_ty != tl.float32
    if HOIST_TABLE:
        table_tile = _load_table_tile(table, program, P * P, BLOCK, C)
    output_bias = tl.load(output_vector + color)[None, :]
    hoisted = ()
    if HOIST:
        for block in tl.static_range(NUM_BLOCKS):
            hoisted = hoisted + (_load_matrices(matrices, block, C),)  # noqa: RUF005 Triton's way

    for index in range(0, tl.cdiv(num_tiles - program, programs)):
        tile = program + index * programs
        offset, exists = _place(tile, num_patches, patches, patch_columns, P, BLOCK)
        if not HOIST_TABLE:
            table_tile = _load_table_tile(table, tile, P * P, BLOCK, C)
        h = _embed(x, offset, exists, plane, rgb_vectors, table_tile, C)
        condition = _condition(y, tile, exists, BLOCK, C, APPROXIMATE)
        for block in tl.static_range(NUM_BLOCKS):
            block_matrices = hoisted[block] if HOIST else _load_matrices(matrices, block, C)
            h = _block(h, condition, block_matrices, _load_vectors(vectors, block, C), APPROXIMATE)
        n, _ = _normalise(h)
        result = _product(n.to(condition.dtype), output) + output_bias
        tl.store(
            velocity + offset[:, None] + color[None, :] * plane,
            result.to(velocity.dtype.element_ty),
            mask=exists[:, None] & (color < 3)[None, :],
        )


@triton.jit
def _sums_place(C: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a (2C, COLUMNS) sum, and which of its elements mean something."""
    row = tl.arange(0, 2 * C)[:, None]
    return _square(2 * C, COLUMNS), (row % 2 == 0) | (row == 1)


@triton.jit
def _load_sums(place, C: tl.constexpr, COLUMNS: tl.constexpr):
    offset, used = _sums_place(C, COLUMNS)
    return tl.load(place + offset, mask=used, other=0)


@triton.jit
def _store_sums(place, sums, C: tl.constexpr, COLUMNS: tl.constexpr):
    offset, used = _sums_place(C, COLUMNS)
    tl.store(place + offset, sums, mask=used)


@triton.jit
def _with_ones(a):
    """The columns of a, each followed by one of ones."""
    pairs = tl.join(a, tl.full(a.shape, 1, a.dtype))
    return pairs.reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def _add_outer(sums, a, b):
    """Add aᵀ b: of an affine map with inputs `_with_ones` and gradient b of its result.

    The even rows are the gradient of the matrix, every odd row is that of the bias. The tensor
    cores' smallest product has twice as many rows as C, so the bias costs nothing.
    """
    return tl.dot(tl.trans(a), b, sums, input_precision="ieee")


@triton.jit
def _block_backward(
    block,
    first,
    count,
    x,
    y,
    matrices,
    vectors,
    rgb_matrix,
    rgb_vectors,
    table,
    grad_x,
    grad_y,
    inputs,
    grad_h,
    partial,
    num_patches,
    patches,
    patch_columns,
    FIRST: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """One block for a program's group of tiles; the first block with the input projections."""
    programs = tl.num_programs(0)
    plane = patches.to(tl.int64) * (P * P)
    color = tl.arange(0, COLORS)
    dtype: tl.constexpr = y.dtype.element_ty
    block_matrices = _load_matrices(matrices, block, C)

    SUMS: tl.constexpr = 2 * C * C
    own = partial + block * (MATRICES * SUMS)
    scale_sums = _load_sums(own, C, C)
    shift_sums = _load_sums(own + SUMS, C, C)
    gate_sums = _load_sums(own + 2 * SUMS, C, C)
    fc1_sums = _load_sums(own + 3 * SUMS, C, C)
    fc2_sums = _load_sums(own + 4 * SUMS, C, C)
    rgb_place = partial + NUM_BLOCKS * (MATRICES * SUMS) + 2 * C * COLORS
    table_place = rgb_place + 2 * C * COLORS
    if FIRST:
        rgb_sums = _load_sums(rgb_place, C, COLORS)
        table_sums = tl.load(table_place + _square(BLOCK, C))
        rgb = tl.load(rgb_matrix + _square(C, COLORS))

    for t in range(0, count):
        tile = first + t * programs
        offset, exists = _place(tile, num_patches, patches, patch_columns, P, BLOCK)
        condition = _condition(y, tile, exists, BLOCK, C, APPROXIMATE)
        condition = _computed_once(condition, APPROXIMATE)
        tile_square = t * (BLOCK * C) + _square(BLOCK, C)
        if FIRST:
            table_tile = _load_table_tile(table, tile, P * P, BLOCK, C)
            h = _embed(x, offset, exists, plane, rgb_vectors, table_tile, C)
        else:
            h = tl.load(inputs + (block - 1) * (GROUP * BLOCK * C) + tile_square).to(tl.float32)
        grad = tl.load(grad_h + tile_square)
        block_vectors = _load_vectors(vectors, block, C)

        n, rstd = _normalise(h)
        scale, z = _modulate(n, condition, block_matrices, block_vectors)
        a = _affine(z, block_matrices, block_vectors, 3)
        sigmoid_a = _sigmoid(a, APPROXIMATE)
        u = _computed_once((a * sigmoid_a).to(dtype), APPROXIMATE)
        derivative = _silu_derivative(a, sigmoid_a)
        grad_gate = (grad * _affine(u, block_matrices, block_vectors, 4)).to(dtype)
        grad_output = (grad * _affine(condition, block_matrices, block_vectors, 2)).to(dtype)
        fc2_sums = _add_outer(fc2_sums, _with_ones(u), grad_output)
        grad_a = _product(grad_output, tl.trans(block_matrices[4]))
        grad_a = (grad_a * derivative).to(dtype)
        fc1_sums = _add_outer(fc1_sums, _with_ones(z), grad_a)
        grad_z = _product(grad_a, tl.trans(block_matrices[3]))
        grad += _normalise_backward(grad_z * scale, n, rstd)

        grad_scale = (grad_z * n).to(dtype)
        grad_shift = grad_z.to(dtype)
        condition_ones = _with_ones(condition)
        scale_sums = _add_outer(scale_sums, condition_ones, grad_scale)
        shift_sums = _add_outer(shift_sums, condition_ones, grad_shift)
        gate_sums = _add_outer(gate_sums, condition_ones, grad_gate)

        grad_condition = _product(grad_scale, tl.trans(block_matrices[0]))
        grad_condition += _product(grad_shift, tl.trans(block_matrices[1]))
        grad_condition += _product(grad_gate, tl.trans(block_matrices[2]))
        y_square = tile.to(tl.int64) * (BLOCK * C) + _square(BLOCK, C)
        y_exists = exists[:, None]
        if not (FIRST and NUM_BLOCKS == 1):
            # The last block comes first and finds nothing to add to.
            earlier = tl.load(grad_y + y_square, mask=y_exists & (block < NUM_BLOCKS - 1), other=0)
            grad_condition += earlier.to(tl.float32)
        if FIRST:
            # A second load, because the registers cannot hold y, and volatile to remain one.
            value = tl.load(y + y_square, mask=y_exists, other=0, volatile=True).to(tl.float32)
            grad_condition *= _silu_derivative(value, _sigmoid(value, APPROXIMATE))
        tl.store(grad_y + y_square, grad_condition.to(dtype), mask=y_exists)

        if FIRST:
            table_sums += grad
            grad_embedding = grad.to(dtype)
            color_place = offset[:, None] + color[None, :] * plane
            color_exists = exists[:, None] & (color < 3)[None, :]
            colors = tl.load(x + color_place, mask=color_exists, other=0).to(dtype)
            rgb_sums = _add_outer(rgb_sums, _with_ones(grad_embedding), colors)
            if grad_x is not None:
                tl.store(
                    grad_x + color_place,
                    _product(grad_embedding, rgb).to(grad_x.dtype.element_ty),
                    mask=color_exists,
                )
        else:
            tl.store(grad_h + tile_square, grad)

    _store_sums(own, scale_sums, C, C)
    _store_sums(own + SUMS, shift_sums, C, C)
    _store_sums(own + 2 * SUMS, gate_sums, C, C)
    _store_sums(own + 3 * SUMS, fc1_sums, C, C)
    _store_sums(own + 4 * SUMS, fc2_sums, C, C)
    if FIRST:
        _store_sums(rgb_place, rgb_sums, C, COLORS)
        tl.store(table_place + _square(BLOCK, C), table_sums)


@triton.jit(do_not_specialize=["num_tiles", "num_patches", "patches", "patch_columns"])
def backward_kernel(
    grad_velocity,  # (B, 3, H, W)
    x,  # (B, 3, H, W)
    y,  # (B·L, p², C)
    matrices,  # as in forward_kernel, up to `table`
    vectors,
    output_matrix,
    rgb_matrix,  # (C, 16), dtype of y: rgb_vectors transposed
    rgb_vectors,
    table,
    grad_x,  # (B, 3, H, W), or None
    grad_y,  # (B·L, p², C)
    inputs,  # scratch (programs, blocks - 1, GROUP, BLOCK, C), dtype of y
    grad_h,  # scratch (programs, GROUP, BLOCK, C) float32
    partials,  # (programs, partial_size) float32, zero before
    num_tiles,
    num_patches,
    patches,
    patch_columns,
    NUM_BLOCKS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # tiles that a program takes through all blocks at a time
    APPROXIMATE: tl.constexpr,
):
    """All gradients of the per-pixel part; those of the weights as one sum for each program.

    The sums for all blocks do not fit into the registers. So a program takes a group of tiles
    forward, keeping the blocks' inputs in its own scratch memory, which stays in the cache, and
    then goes back block by block through the whole group with one block's sums at a time.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    plane = patches.to(tl.int64) * (P * P)
    color = tl.arange(0, COLORS)
    dtype: tl.constexpr = y.dtype.element_ty
    GROUP_SIZE: tl.constexpr = GROUP * BLOCK * C
    BLOCKS_PARTIAL: tl.constexpr = NUM_BLOCKS * MATRICES * 2 * C * C
    PARTIAL: tl.constexpr = BLOCKS_PARTIAL + 4 * C * COLORS + BLOCK * C
    inputs += program.to(tl.int64) * ((NUM_BLOCKS - 1) * GROUP_SIZE)
    grad_h += program.to(tl.int64) * GROUP_SIZE
    partial = partials + program.to(tl.int64) * PARTIAL
    output_place = partial + BLOCKS_PARTIAL

    for first in range(program, num_tiles, programs * GROUP):
        count = tl.minimum(GROUP, tl.cdiv(num_tiles - first, programs))
        output = tl.load(output_matrix + _square(C, COLORS))
        output_sums = _load_sums(output_place, C, COLORS)
        for t in range(0, count):
            tile = first + t * programs
            offset, exists = _place(tile, num_patches, patches, patch_columns, P, BLOCK)
            table_tile = _load_table_tile(table, tile, P * P, BLOCK, C)
            h = _embed(x, offset, exists, plane, rgb_vectors, table_tile, C)
            condition = _condition(y, tile, exists, BLOCK, C, APPROXIMATE)
            tile_square = t * (BLOCK * C) + _square(BLOCK, C)
            for block in tl.static_range(NUM_BLOCKS):
                if block > 0:
                    tl.store(inputs + (block - 1) * GROUP_SIZE + tile_square, h.to(dtype))
                h = _block(
                    h,
                    condition,
                    _load_matrices(matrices, block, C),
                    _load_vectors(vectors, block, C),
                    APPROXIMATE,
                )
            n, rstd = _normalise(h)
            grad_result = tl.load(
                grad_velocity + offset[:, None] + color[None, :] * plane,
                mask=exists[:, None] & (color < 3)[None, :],
                other=0,
            ).to(dtype)
            output_sums = _add_outer(output_sums, _with_ones(n.to(dtype)), grad_result)
            grad_n = _product(grad_result, tl.trans(output))
            tl.store(grad_h + tile_square, _normalise_backward(grad_n, n, rstd))
        _store_sums(output_place, output_sums, C, COLORS)

        for step in range(0, NUM_BLOCKS - 1):
            # What one thread has stored another may load: of the scratch memory, and of grad_y.
            tl.debug_barrier()
            _block_backward(
                NUM_BLOCKS - 1 - step,
                first,
                count,
                x,
                y,
                matrices,
                vectors,
                rgb_matrix,
                rgb_vectors,
                table,
                grad_x,
                grad_y,
                inputs,
                grad_h,
                partial,
                num_patches,
                patches,
                patch_columns,
                False,
                NUM_BLOCKS,
                C,
                P,
                BLOCK,
                GROUP,
                APPROXIMATE,
            )
        tl.debug_barrier()
        _block_backward(
            0,
            first,
            count,
            x,
            y,
            matrices,
            vectors,
            rgb_matrix,
            rgb_vectors,
            table,
            grad_x,
            grad_y,
            inputs,
            grad_h,
            partial,
            num_patches,
            patches,
            patch_columns,
            True,
            NUM_BLOCKS,
            C,
            P,
            BLOCK,
            GROUP,
            APPROXIMATE,
        )
        tl.debug_barrier()
