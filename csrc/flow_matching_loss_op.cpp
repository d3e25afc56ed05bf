#include "flow_matching_loss_op.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <vector>

#include "flow_matching_loss.h"
#include "instruction_set.h"
#include "tensors.h"

namespace deco {
namespace {

constexpr const FlowMatchingLossKernel* kKernels[] = DECO_KERNELS(flow_matching_loss);
constexpr int64_t kTilesPerTask = 4;  // some ten microseconds

at::Tensor scalar(double value) { return at::scalar_tensor(value, at::kFloat); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> flow_matching_loss_forward(
    const at::Tensor& prediction, const at::Tensor& target, const at::Tensor& table, double weight,
    const std::optional<at::Tensor>& timestep_weight, bool with_gradient) {
  const int64_t batch = prediction.size(0), height = prediction.size(2), width = prediction.size(3);
  check(prediction, {batch, 3, height, width}, "prediction");
  check(target, {batch, 3, height, width}, "target");
  check_float(table, {3, 8, 8}, "table");
  at::Tensor gradient =
      with_gradient ? at::empty_like(prediction) : at::empty({0}, prediction.options());
  FlowMatchingLoss loss{};
  loss.batch = batch;
  loss.height = height;
  loss.width = width;
  loss.prediction_element = element_of(prediction);
  loss.target_element = element_of(target);
  loss.prediction = prediction.const_data_ptr();
  loss.target = target.const_data_ptr();
  loss.table = table.const_data_ptr<float>();
  if (timestep_weight) {
    check_float(*timestep_weight, {batch}, "timestep_weight");
    loss.timestep_weight = timestep_weight->const_data_ptr<float>();
  }
  loss.weight = static_cast<float>(weight);
  loss.gradient = with_gradient ? gradient.data_ptr() : nullptr;

  const FlowMatchingLossKernel& kernel = *kKernels[static_cast<int>(selected_instruction_set())];
  const int64_t tiles = prediction.numel() == 0 ? 0 : kernel.tiles(loss);
  std::vector<double> partials(2 * tiles);
  loss.partials = partials.data();
  at::parallel_for(0, tiles, kTilesPerTask, [&](int64_t begin, int64_t end) {
    kernel.run(loss, begin, end);
  });

  double flow_matching = 0, frequency = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    flow_matching += partials[2 * tile];
    frequency += partials[2 * tile + 1];
  }
  const auto values = static_cast<double>(prediction.numel());
  const auto coefficients = static_cast<double>(3 * batch * ((height + 7) / 8 * 8) *
                                                ((width + 7) / 8 * 8));
  flow_matching /= values;
  frequency /= coefficients;
  return {scalar(flow_matching + weight * frequency), scalar(flow_matching), scalar(frequency),
          gradient};
}

}  // namespace deco
