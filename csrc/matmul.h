// Large products of matrices: C = A·B, or C += A·B, with sums in float32.
//
// B is packed: `columns` of its columns at a time become a panel, whose rows lie one after the
// other, so that a product reads it from the first address to the last. A task takes `rows` rows
// of A, which it copies where they do not lie as it wants them, to any number of panels; it sums
// kDepth products at a time, for which both operands stay in the second cache. With one instruction
// set every C is the same sum in the same order, however the work is shared.
//
// Compiled once for each instruction set; see pixel_decoder.h.
#pragma once

#include <cstdint>

#include "element.h"

namespace deco {

// One of the strides is 1; both count elements.
struct MatmulOperand {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
};

struct MatmulPanel {
  MatmulOperand b;  // (depth, count), count ≤ columns
  Element element;
  int64_t depth;
  int64_t count;
  float* panel;  // panel_size numbers
};

struct MatmulTask {
  MatmulOperand a;  // (rows, depth), of at most `rows` rows
  Element element;
  int64_t depth;
  int64_t rows;
  const float* panels;  // one after the other
  int64_t columns;      // of C
  void* c;              // (rows, columns)
  int64_t c_stride;     // elements from row to row
  Element c_element;
  bool add;          // to what is in C
  float* workspace;  // workspace_size numbers
};

struct MatmulKernel {
  int64_t rows;
  int64_t columns;
  // In numbers of 32 bits, for operands of an element and a depth.
  int64_t (*panel_size)(Element, int64_t depth);
  int64_t (*workspace_size)(Element, int64_t depth);
  void (*pack)(const MatmulPanel&);
  void (*multiply)(const MatmulTask&);
};

namespace baseline {
extern const MatmulKernel matmul;
}
namespace avx2 {
extern const MatmulKernel matmul;
}
namespace avx512 {
extern const MatmulKernel matmul;
}
namespace avx512_bf16 {
extern const MatmulKernel matmul;
}
namespace amx {
extern const MatmulKernel matmul;
}

}  // namespace deco
