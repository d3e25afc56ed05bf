// The linear layer with a packed weight, on tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace deco {

// Whether this build of torch has oneDNN's block products; whether this CPU has them for a dtype,
// only a call tells.
bool has_block_products();

// (N, K), float32 or bfloat16, to (1, ⌈N/64⌉, K, 64): blocks of 64 rows, transposed, zeros at the
// end; in bfloat16 pairs of k are neighbours, K even. With `split` a float32 weight becomes two
// bfloat16 ones, (2, ⌈N/64⌉, K, 64), that sum to it.
at::Tensor pack_weight(const at::Tensor& weight, bool split);

// x (M, K) times the transpose of the weight that was packed, + bias (N) in float32: (M, N) in the
// dtype of x. A float32 x with a split weight is the sum of three bfloat16 products, x_high·w_high
// + x_high·w_low + x_low·w_high, accumulated in float32.
//
// With `swiglu` the weight's blocks hold 32 rows of the gate and then the 32 rows of the value that
// they meet, and the result is silu(gate) · value, (M, N/2).
at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, int64_t out_features, bool swiglu);

}  // namespace deco
