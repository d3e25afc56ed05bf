// The loss on tensors: kernels/flow_matching_loss/cpu.py hands both on.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace deco {

// prediction and target: (B, 3, H, W), each float32, bfloat16 or float16; table: (3, 8, 8);
// timestep_weight: (B). Returns the total, the two terms, and the gradient of the total with
// respect to the prediction, in the dtype of that (float32 for float16), empty without
// `with_gradient`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> flow_matching_loss_forward(
    const at::Tensor& prediction, const at::Tensor& target, const at::Tensor& table, double weight,
    const std::optional<at::Tensor>& timestep_weight, bool with_gradient);

// The same, and the total can be differentiated, once, with respect to prediction and target.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> flow_matching_loss(
    const at::Tensor& prediction, const at::Tensor& target, const at::Tensor& table, double weight,
    const std::optional<at::Tensor>& timestep_weight, bool with_gradient);

}  // namespace deco
