// The fused per-pixel decoder: from the noisy image and the upsampled condition to the velocity.
//
// For N = batch·(height/p)·(width/p) tokens of p² pixels, with h, z, … rows of C channels:
//   h = rgb_weight · x + table[pixel]              (the two input projections, folded)
//   c = silu(y + upsample_bias[pixel])
//   each block: shift, scale, gate = modulation · c;  z = layer_norm(h) · (1 + scale) + shift
//               h = h + gate · fc2(silu(fc1(z)))
//   velocity = output · layer_norm(h)
//
// A call may take some of each patch's pixels, so that only their part of y need exist at a time.
//
// The implementation, pixel_decoder.cpp, is compiled once for each instruction set. It includes
// neither torch nor standard templates: their inline copies would be compiled for that
// instruction set too, and the linker may keep any one of them.
#pragma once

#include <cstdint>

#include "element.h"

namespace deco {

constexpr int kMaxDecoderBlocks = 6;

struct PixelDecoderShape {
  int64_t batch;
  int64_t height;  // divisible by patch_size
  int64_t width;   // divisible by patch_size
  int patch_size;
  int channels;  // 16, 32 or 64
  int blocks;    // 1 … kMaxDecoderBlocks
  // Of each patch, row by row: this call takes P pixels from `first_pixel` on.
  int64_t first_pixel;
  int64_t pixels;
  // How y and its gradient are stored, and in what the small products are computed. All sums,
  // the residual stream and the normalisation are float32.
  Element element;
};

// All float32 and contiguous, matrices (out, in) as in torch.
struct PixelDecoderBlockWeights {
  const float* norm_weight;
  const float* norm_bias;
  const float* modulation_weight;  // (3C, C): shift, scale, gate
  const float* modulation_bias;
  const float* fc1_weight;
  const float* fc1_bias;
  const float* fc2_weight;
  const float* fc2_bias;
};

struct PixelDecoderWeights {
  const float* rgb_weight;     // (C, 3) = input_proj_weight · pixel_embedder_weight[:, :3]
  const float* table;          // (p², C): the position features and both biases, projected
  const float* upsample_bias;  // (p², C)
  PixelDecoderBlockWeights blocks[kMaxDecoderBlocks];
  const float* output_weight;  // (3, C)
  const float* output_bias;    // (3)
};

struct PixelDecoderForward {
  PixelDecoderShape shape;
  PixelDecoderWeights weights;
  const void* packed;  // what `pack` wrote
  const float* x;      // (B, 3, H, W)
  const void* y;       // (P·C, N) = upsample_weight · tokensᵀ of these pixels, without its bias
  float* velocity;     // (B, 3, H, W), of which the call's pixels are written
};

struct PixelDecoderBackward {
  PixelDecoderShape shape;
  PixelDecoderWeights weights;
  const void* packed;
  const float* x;
  const void* y;
  const float* grad_velocity;  // (B, 3, H, W)
  float* grad_x;               // as the velocity, or null where it is not wanted
  void* grad_y;                // (P·C, N)
  float* grad_table;           // (segments, P, C): the caller sums over the segments
  float* grad_upsample_bias;   // (segments, P, C): likewise
  float* partials;             // (chunks, gradient_size): a row per chunk, written by its call
  float* gradients;            // (gradient_size): what `reduce` makes of the rows
};

// Calls with different chunks may run at the same time. How the work is cut depends on the shape
// alone, so the result does not depend on the number of threads.
struct PixelDecoderKernels {
  int64_t (*packed_bytes)(const PixelDecoderShape&);  // `packed` must be aligned to 64 bytes
  void (*pack)(const PixelDecoderShape&, const PixelDecoderWeights&, void* packed);
  int64_t (*chunks)(const PixelDecoderShape&);
  int64_t (*segments)(const PixelDecoderShape&);
  // The gradients of the weights that all pixels share, flat and without gaps: rgb_weight, the
  // eight of each block in the order above, output_weight, output_bias.
  int64_t (*gradient_size)(const PixelDecoderShape&);
  void (*forward)(const PixelDecoderForward&, int64_t chunk);
  void (*backward)(const PixelDecoderBackward&, int64_t chunk);
  // Sums the elements [begin, end) of the chunks' rows into `gradients`.
  void (*reduce)(const PixelDecoderBackward&, int64_t begin, int64_t end);
};

// One table for each namespace that pixel_decoder.cpp is compiled into.
namespace baseline {
extern const PixelDecoderKernels pixel_decoder;
}
namespace avx2 {
extern const PixelDecoderKernels pixel_decoder;
}
namespace avx512 {
extern const PixelDecoderKernels pixel_decoder;
}
namespace avx512_bf16 {
extern const PixelDecoderKernels pixel_decoder;
}
namespace amx {
extern const PixelDecoderKernels pixel_decoder;
}

}  // namespace deco
