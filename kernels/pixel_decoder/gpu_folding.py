"""`folding` and its gradient on a GPU, each in one launch: what takes part is tiny, so that dozens
of launches would cost more than the decoder (Triton).

All parameters but the upsampling's come as one flat float32 tensor, in the order of `small` in
`deco_fast.kernels.registration`, and so do their gradients leave. One program folds one block; of
those that follow, each folds some rows of the position table.

The input projections fold as in `folding`. A block's LayerNorm weights g and b fold into its
modulation, whose two affine maps are then

    z = n · scale(c) + shift(c)    scale = g ∘ (1 + W_s c + b_s)
                                   shift = b ∘ (1 + W_s c + b_s) + W_t c + b_t
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from deco_fast.kernels.pixel_decoder.gpu_kernels import COLORS, MATRICES, RGB
from deco_fast.kernels.pixel_decoder.reference import POSITION_FEATURES

FEATURES = tl.constexpr(POSITION_FEATURES)


@triton.jit
def _inputs_size(C: tl.constexpr):
    return C * (RGB + FEATURES) + C + C * C + C


@triton.jit
def _block_size(C: tl.constexpr):
    return 5 * C * C + 7 * C


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _transposed(C: tl.constexpr):
    """Offsets of a (C, C) matrix, (out, in), as (in, out)."""
    return tl.arange(0, C)[:, None] + tl.arange(0, C)[None, :] * C


@triton.jit
def _embedder(C: tl.constexpr):
    """Offsets of the pixel embedder's weight: its position features, its colours, which exist."""
    row = tl.arange(0, C)[:, None] * (RGB + FEATURES)
    color = tl.arange(0, COLORS)[None, :]
    return row + RGB + tl.arange(0, FEATURES)[None, :], row + color, color < RGB


@triton.jit
def _load_input_projections(flat, C: tl.constexpr):
    """The pixel embedder's weight, for features and colours, its bias, and the projection's."""
    features, colors, is_color = _embedder(C)
    channel = tl.arange(0, C)
    bias = flat + C * (RGB + FEATURES)
    projection = bias + C
    return (
        tl.load(flat + features),
        tl.load(flat + colors, mask=is_color, other=0),
        tl.load(bias + channel),
        tl.load(projection + channel[:, None] * C + channel[None, :]),
        tl.load(projection + C * C + channel),
    )


@triton.jit
def _fold_block(parameters, matrices, vectors, C: tl.constexpr):
    channel = tl.arange(0, C)
    transposed = _transposed(C)
    place = channel[:, None] * C + channel[None, :]
    norm_weight = tl.load(parameters + channel)
    norm_bias = tl.load(parameters + C + channel)
    weight = parameters + 2 * C
    bias = weight + 3 * C * C
    scale_weight = tl.load(weight + C * C + transposed)
    scale_bias = 1 + tl.load(bias + C + channel)
    shift_weight = tl.load(weight + transposed) + norm_bias[None, :] * scale_weight
    tl.store(matrices + place, norm_weight[None, :] * scale_weight)
    tl.store(matrices + C * C + place, shift_weight)
    tl.store(matrices + 2 * C * C + place, tl.load(weight + 2 * C * C + transposed))
    tl.store(vectors + channel, norm_weight * scale_bias)
    tl.store(vectors + C + channel, tl.load(bias + channel) + norm_bias * scale_bias)
    tl.store(vectors + 2 * C + channel, tl.load(bias + 2 * C + channel))
    mlp = bias + 3 * C
    for k in tl.static_range(2):
        layer = mlp + k * (C * C + C)
        tl.store(matrices + (3 + k) * C * C + place, tl.load(layer + transposed))
        tl.store(vectors + (3 + k) * C + channel, tl.load(layer + C * C + channel))


@triton.jit
def fold_kernel(
    flat,  # all parameters but the upsampling's, float32
    position,  # (p², 64) float32
    matrices,  # (blocks, 5, C, C), (in, out)
    vectors,  # (blocks, 5, C) float32
    output_matrix,  # (C, 16)
    output_vector,  # (16,) float32
    rgb_vectors,  # (3, C) float32
    table,  # (p², C) float32
    NUM_BLOCKS: tl.constexpr,
    C: tl.constexpr,
    AREA: tl.constexpr,
    ROWS: tl.constexpr,  # of the table in a program
):
    """What the decoder's kernels read of its parameters; (p², 64) are the position features."""
    program = tl.program_id(0)
    if program < NUM_BLOCKS:
        _fold_block(
            flat + _inputs_size(C) + program * _block_size(C),
            matrices + program * (MATRICES * C * C),
            vectors + program * (MATRICES * C),
            C,
        )
    else:
        features, colors, embedder_bias, projection, bias = _load_input_projections(flat, C)
        row = (program - NUM_BLOCKS) * ROWS + tl.arange(0, ROWS)[:, None]
        feature = tl.arange(0, FEATURES)[None, :]
        channel = tl.arange(0, C)
        bias += tl.sum(projection * embedder_bias[None, :], axis=1)
        place = tl.load(position + row * FEATURES + feature, mask=row < AREA, other=0)
        rows = _product(place, tl.trans(_product(projection, features))) + bias[None, :]
        tl.store(table + row * C + channel[None, :], rows, mask=row < AREA)
        if program == NUM_BLOCKS:
            color = tl.arange(0, COLORS)
            is_color = color < RGB
            square = channel[:, None] * COLORS + color[None, :]
            rgb = _product(projection, colors)
            tl.store(
                rgb_vectors + color[None, :] * C + channel[:, None], rgb, mask=is_color[None, :]
            )
            output = flat + _inputs_size(C) + NUM_BLOCKS * _block_size(C)
            weight = tl.load(
                output + color[None, :] * C + channel[:, None], mask=is_color[None, :], other=0
            )
            tl.store(output_matrix + square, weight)
            tl.store(
                output_vector + color, tl.load(output + RGB * C + color, mask=is_color, other=0)
            )


@triton.jit
def _sum_places(sums, places, partial_size, offsets, mask):
    total = tl.load(sums + offsets, mask=mask, other=0)
    for place in range(1, places):
        total += tl.load(sums + place * partial_size + offsets, mask=mask, other=0)
    return total


@triton.jit
def _fold_block_backward(sums, places, partial_size, parameters, grads, C: tl.constexpr):
    channel = tl.arange(0, C)
    square = channel[:, None] * C + channel[None, :]
    transposed = _transposed(C)
    everywhere = square >= 0
    everything = channel >= 0
    vector_sums = sums + MATRICES * C * C
    norm_weight = tl.load(parameters + channel)
    norm_bias = tl.load(parameters + C + channel)
    weight = 2 * C
    bias = weight + 3 * C * C
    scale_weight = tl.load(parameters + weight + C * C + transposed)
    scale_bias = 1 + tl.load(parameters + bias + C + channel)

    scale = _sum_places(sums, places, partial_size, square, everywhere)
    shift = _sum_places(sums + C * C, places, partial_size, square, everywhere)
    scale_vector = _sum_places(vector_sums, places, partial_size, channel, everything)
    shift_vector = _sum_places(vector_sums + C, places, partial_size, channel, everything)
    tl.store(grads + channel, tl.sum(scale * scale_weight, axis=0) + scale_vector * scale_bias)
    tl.store(grads + C + channel, tl.sum(shift * scale_weight, axis=0) + shift_vector * scale_bias)
    tl.store(grads + weight + transposed, shift)
    scale = norm_weight[None, :] * scale + norm_bias[None, :] * shift
    tl.store(grads + weight + C * C + transposed, scale)
    tl.store(grads + bias + channel, shift_vector)
    tl.store(grads + bias + C + channel, norm_weight * scale_vector + norm_bias * shift_vector)
    # What folding leaves as it is: the gate, fc1, fc2.
    for k in tl.static_range(2, 5):
        matrix = _sum_places(sums + k * C * C, places, partial_size, square, everywhere)
        vector = _sum_places(vector_sums + k * C, places, partial_size, channel, everything)
        layer = bias + 3 * C + (k - 3) * (C * C + C)
        tl.store(grads + (weight + 2 * C * C if k == 2 else layer) + transposed, matrix)
        tl.store(grads + (bias + 2 * C if k == 2 else layer + C * C) + channel, vector)


@triton.jit(do_not_specialize=["places", "partial_size"])
def fold_backward_kernel(
    sums,  # (places, partial_size) float32: backward_kernel's, over programs of the same place
    flat,  # as in fold_kernel
    position,  # (p², 64) float32
    grads,  # like flat
    places,
    partial_size,
    NUM_BLOCKS: tl.constexpr,
    C: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK: tl.constexpr,  # rows of the table at one place
    ROWS: tl.constexpr,  # of the table at a time
):
    """The gradients of the parameters from those of what fold_kernel makes of them."""
    program = tl.program_id(0)
    table = sums + COLORS + 2 * RGB * C
    if program < NUM_BLOCKS:
        place = _inputs_size(C) + program * _block_size(C)
        _fold_block_backward(
            table + BLOCK * C + program * (MATRICES * (C * C + C)),
            places,
            partial_size,
            flat + place,
            grads + place,
            C,
        )
    else:
        channel = tl.arange(0, C)
        color = tl.arange(0, COLORS)
        is_color = color < RGB
        output = grads + _inputs_size(C) + NUM_BLOCKS * _block_size(C)
        by_color = color[None, :] * C + channel[:, None]
        some = is_color[None, :]
        grad = _sum_places(sums + COLORS, places, partial_size, by_color, some)
        tl.store(output + by_color, grad, mask=some)
        grad = _sum_places(sums, places, partial_size, color, is_color)
        tl.store(output + RGB * C + color, grad, mask=is_color)

        features, colors, embedder_bias, projection, _ = _load_input_projections(flat, C)
        grad_colors = _sum_places(sums + COLORS + RGB * C, places, partial_size, by_color, some)
        grad_features = tl.zeros((C, FEATURES), tl.float32)
        grad_bias = tl.zeros((C,), tl.float32)
        feature = tl.arange(0, FEATURES)[None, :]
        for start in range(0, places * BLOCK, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            rows = tl.load(table + row // BLOCK * partial_size + row % BLOCK * C + channel[None, :])
            place = tl.load(position + row % AREA * FEATURES + feature)
            grad_features += _product(tl.trans(rows), place)
            grad_bias += tl.sum(rows, axis=0)

        feature_place, color_place, _ = _embedder(C)
        transposed = tl.trans(projection)
        tl.store(grads + feature_place, _product(transposed, grad_features))
        grad = _product(transposed, grad_colors)
        tl.store(grads + color_place, grad, mask=is_color[None, :])
        grads += C * (RGB + FEATURES)
        tl.store(grads + channel, tl.sum(projection * grad_bias[:, None], axis=0))
        grad = _product(grad_features, tl.trans(features)) + _product(grad_colors, tl.trans(colors))
        grad += grad_bias[:, None] * embedder_bias[None, :]
        tl.store(grads + C + channel[:, None] * C + channel[None, :], grad)
        tl.store(grads + C + C * C + channel, grad_bias)
