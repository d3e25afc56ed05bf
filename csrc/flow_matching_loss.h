// Flow matching plus the frequency-aware loss, and the gradient of their sum, in one pass.
//
//   d = prediction − target          flow_matching = mean(timestep_weight · d²)
//   C = DCT₈ₓ₈(YCbCr(d))             frequency = mean(table ∘ C²)
//   gradient of flow_matching + weight · frequency with respect to the prediction:
//     2/values · timestep_weight · d + 2 weight/coefficients · YCbCrᵀ(DCTᵀ(table ∘ C))
//
// Sides that are no multiple of 8 are padded by reflection, whose transpose folds the gradient
// back. The implementation is compiled once for each instruction set; see pixel_decoder.h.
#pragma once

#include <cstdint>

#include "element.h"

namespace deco {

struct FlowMatchingLoss {
  int64_t batch;
  int64_t height;
  int64_t width;
  Element prediction_element;
  Element target_element;
  const void* prediction;        // (B, 3, H, W)
  const void* target;            // (B, 3, H, W)
  const float* table;            // (3, 8, 8)
  const float* timestep_weight;  // (B), or null for ones
  float weight;
  void* gradient;    // (B, 3, H, W) in the element of the prediction, or null
  double* partials;  // (tiles, 2): the sums of weighted d² and of table ∘ C²
};

// Calls with different tiles may run at the same time. Tiles depend on the shape alone, so the
// result does not depend on the number of threads.
struct FlowMatchingLossKernel {
  int64_t (*tiles)(const FlowMatchingLoss&);
  void (*run)(const FlowMatchingLoss&, int64_t begin, int64_t end);  // of the tiles
};

namespace baseline {
extern const FlowMatchingLossKernel flow_matching_loss;
}
namespace avx2 {
extern const FlowMatchingLossKernel flow_matching_loss;
}
namespace avx512 {
extern const FlowMatchingLossKernel flow_matching_loss;
}
namespace avx512_bf16 {
extern const FlowMatchingLossKernel flow_matching_loss;
}
namespace amx {
extern const FlowMatchingLossKernel flow_matching_loss;
}

}  // namespace deco
