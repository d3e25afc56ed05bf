// The element-wise ends of a linear layer whose weight is packed for the matrix unit; the products
// between them are oneDNN's (packed_linear_op.cpp).
//
//   split    x = high + low + rest in bfloat16, |rest| ≤ 2⁻¹⁷ |x|
//   finish   a tile of sums in float32 to results: sums + bias, or silu(gate) · value
//
// Compiled once for each instruction set; see pixel_decoder.h.
#pragma once

#include <cstdint>

#include "element.h"

namespace deco {

constexpr int64_t kTileColumns = 64;

enum class Activation { none, swiglu };

struct PackedLinearTile {
  const float* sums;  // (rows, kTileColumns)
  int64_t rows;
  int64_t columns;  // results in a row of the tile, up to kTileColumns; of swiglu half as many
  const float* bias;  // (columns), or null; none with swiglu
  Activation activation;
  Element element;
  void* results;   // the first of them
  int64_t stride;  // results from row to row
};

struct PackedLinearKernel {
  void (*split)(const float* x, void* high, void* low, int64_t count);
  void (*finish)(const PackedLinearTile&);
};

namespace baseline {
extern const PackedLinearKernel packed_linear;
}
namespace avx2 {
extern const PackedLinearKernel packed_linear;
}
namespace avx512 {
extern const PackedLinearKernel packed_linear;
}
namespace avx512_bf16 {
extern const PackedLinearKernel packed_linear;
}
namespace amx {
extern const PackedLinearKernel packed_linear;
}

}  // namespace deco
