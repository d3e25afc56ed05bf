// The loss on tensors: kernels/flow_matching_loss/cpu.py calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace deco {

// prediction and target: (B, 3, H, W), contiguous, each float32 or bfloat16; table: (3, 8, 8) and
// timestep_weight: (B), contiguous float32. Returns the total, the two terms, and the gradient of
// the total with respect to the prediction, in the dtype of that, empty without `with_gradient`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> flow_matching_loss_forward(
    const at::Tensor& prediction, const at::Tensor& target, const at::Tensor& table, double weight,
    const std::optional<at::Tensor>& timestep_weight, bool with_gradient);

}  // namespace deco
