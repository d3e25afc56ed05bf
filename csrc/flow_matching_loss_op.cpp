#include "flow_matching_loss_op.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <vector>

#include "flow_matching_loss.h"
#include "instruction_set.h"
#include "tensors.h"

namespace deco {
namespace {

constexpr const FlowMatchingLossKernel* kKernels[] = DECO_KERNELS(flow_matching_loss);
constexpr int64_t kTilesPerTask = 4;  // some ten microseconds

at::Tensor scalar(double value) { return at::scalar_tensor(value, at::kFloat); }

// Converting float16 is the compiler's business and not every compiler's.
at::Tensor readable(const at::Tensor& image) {
  return (image.scalar_type() == at::kHalf ? image.to(at::kFloat) : image).contiguous();
}

at::Tensor as_float(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> flow_matching_loss_forward(
    const at::Tensor& any_prediction, const at::Tensor& any_target, const at::Tensor& any_table,
    double weight, const std::optional<at::Tensor>& any_timestep_weight, bool with_gradient) {
  const at::Tensor prediction = readable(any_prediction), target = readable(any_target);
  const at::Tensor table = as_float(any_table);
  const at::Tensor timestep_weight =
      any_timestep_weight ? as_float(*any_timestep_weight) : at::Tensor();
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
  if (timestep_weight.defined()) {
    check_float(timestep_weight, {batch}, "timestep_weight");
    loss.timestep_weight = timestep_weight.const_data_ptr<float>();
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

namespace {

// The same with autograd; its backward pass is that of kernels/registration.py.
class DifferentiableLoss : public torch::autograd::Function<DifferentiableLoss> {
 public:
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context, const at::Tensor& prediction,
      const at::Tensor& target, const at::Tensor& table, double weight,
      const std::optional<at::Tensor>& timestep_weight, bool with_gradient) {
    auto [total, flow_matching, frequency, gradient] = flow_matching_loss_forward(
        prediction, target, table, weight, timestep_weight, with_gradient);
    context->mark_non_differentiable({flow_matching, frequency});
    context->set_materialize_grads(false);
    context->save_for_backward({gradient});
    context->saved_data["prediction"] = prediction.scalar_type();
    context->saved_data["target"] = target.scalar_type();
    return {total, flow_matching, frequency, gradient};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    const at::Tensor& grad_total = grads[0];
    if (!grad_total.defined()) {
      return torch::autograd::variable_list(6);
    }
    at::Tensor gradient = context->get_saved_variables()[0];
    const auto prediction = context->saved_data["prediction"].toScalarType();
    const auto target = context->saved_data["target"].toScalarType();
    torch::autograd::variable_list result(6);
    const bool for_target = context->needs_input_grad(1);
    if (!for_target && gradient.scalar_type() == prediction && is_last_use(grad_total)) {
      gradient = gradient.detach();
      if (grad_total.item<float>() != 1) {
        gradient.mul_(grad_total);
      }
      result[0] = gradient;
      return result;
    }
    // An op, so that what comes out of it cannot be differentiated again without an error.
    static const auto scaled =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("deco_fast::flow_matching_loss_backward", "")
            .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::ScalarType)>();
    if (context->needs_input_grad(0)) {
      result[0] = scaled.call(grad_total, gradient, prediction);
    }
    if (for_target) {
      result[1] = scaled.call(-grad_total, gradient, target);
    }
    return result;
  }

 private:
  // Whether what was saved may be overwritten: the graph is freed after this pass, and nothing
  // records it.
  static bool is_last_use(const at::Tensor& grad) {
    const bool recorded =
        at::GradMode::is_enabled() || grad.unsafeGetTensorImpl()->is_python_dispatch();
    return !recorded && !torch::autograd::get_current_graph_task_keep_graph();
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> flow_matching_loss(
    const at::Tensor& prediction, const at::Tensor& target, const at::Tensor& table, double weight,
    const std::optional<at::Tensor>& timestep_weight, bool with_gradient) {
  const auto results = DifferentiableLoss::apply(prediction, target, table, weight,
                                                 timestep_weight, with_gradient);
  return {results[0], results[1], results[2], results[3]};
}

}  // namespace deco
