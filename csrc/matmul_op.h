// Large products of matrices on tensors.
#pragma once

#include <ATen/core/Tensor.h>

namespace deco {

// c (M, N) = a (M, K) · b (K, N), or with `add` c + a · b, summed in float32.
//
// a and b are both float32 or both bfloat16, and of each one stride is 1. c is float32 or bfloat16
// and contiguous.
void matmul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, bool add);

// Whether `matmul` is faster here, for operands like a, than torch's libraries. Of Intel's processors
// MKL knows what there is to know about float32, of a matrix unit oneDNN, and of other architectures
// the library of the system.
bool prefers_matmul(const at::Tensor& a);

}  // namespace deco
