// The fused per-pixel decoder on tensors: kernels/pixel_decoder/cpu.py calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace deco {

// All contiguous and on the CPU. N = B·(H/p)·(W/p); `y` (p²·C, N), float32 or bfloat16, is the
// upsampled condition without its bias. `weights`, float32: rgb_weight (C, 3), table (p², C),
// upsample_bias (p²·C), the eight of each block as in BlockParameters, output_weight (3, C),
// output_bias (3). x is (B, 3, H, W) float32, and so is the velocity that this returns.
at::Tensor pixel_decoder_forward(const at::Tensor& x, const at::Tensor& y,
                                 const std::vector<at::Tensor>& weights, int64_t patch_size);

// The gradients of x (empty unless `need_x_grad`), of y in its dtype and of the weights, these in
// float32.
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> pixel_decoder_backward(
    const at::Tensor& grad_velocity, const at::Tensor& x, const at::Tensor& y,
    const std::vector<at::Tensor>& weights, int64_t patch_size, bool need_x_grad);

}  // namespace deco
