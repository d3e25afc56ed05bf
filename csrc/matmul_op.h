// Large products of matrices on tensors.
#pragma once

#include <ATen/core/Tensor.h>

namespace deco {

// c (M, N) = a (M, K) · b (K, N), or with `add` c + a · b, summed in float32.
//
// a and b are both float32 or both bfloat16, and of each one stride is 1. c is float32 or bfloat16
// and contiguous.
void matmul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, bool add);

// Whether `matmul` is faster here, for operands like a, than torch's libraries. It is not for bfloat16
// where there is a matrix unit, which oneDNN uses; for float32 on Intel's processors, which MKL is
// made for, and without AVX2; nor on other architectures.
bool prefers_matmul(const at::Tensor& a);

}  // namespace deco
