// The fused per-pixel decoder on tensors: kernels/pixel_decoder/cpu.py calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace deco {

// All contiguous and on the CPU. N = B·(H/p)·(W/p); `y` (P·C, N), float32 or bfloat16, is the
// upsampled condition without its bias of P pixels of each patch, from `first_pixel` on. `weights`,
// float32: rgb_weight (C, 3), table (p², C), upsample_bias (p²·C), the eight of each block as in
// BlockParameters, output_weight (3, C), output_bias (3). x is (B, 3, H, W) float32, and so is
// `velocity`, of which these pixels are written.
void pixel_decoder_forward(const at::Tensor& x, const at::Tensor& y,
                           const std::vector<at::Tensor>& weights, int64_t patch_size,
                           int64_t first_pixel, const at::Tensor& velocity);

// The gradients of the weights, in float32: of the table (P, C), of the bias (P·C). That of y goes
// into `grad_y`, which is as y, and that of x into `grad_x`, of which these pixels are written,
// where there is one.
std::vector<at::Tensor> pixel_decoder_backward(
    const at::Tensor& grad_velocity, const at::Tensor& x, const at::Tensor& y,
    const std::vector<at::Tensor>& weights, int64_t patch_size, int64_t first_pixel,
    const at::Tensor& grad_y, const std::optional<at::Tensor>& grad_x);

}  // namespace deco
