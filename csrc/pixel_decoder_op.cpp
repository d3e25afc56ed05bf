#include "pixel_decoder_op.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "instruction_set.h"
#include "pixel_decoder.h"
#include "tensors.h"

namespace deco {
namespace {

constexpr const PixelDecoderKernels* kKernels[] = DECO_KERNELS(pixel_decoder);
constexpr int64_t kReducedPerTask = 2048;
constexpr size_t kPerBlock = 8;
constexpr size_t kBeforeBlocks = 3;  // rgb_weight, table, upsample_bias
constexpr size_t kAfterBlocks = 2;   // output_weight, output_bias

PixelDecoderShape checked_shape(const at::Tensor& x, const at::Tensor& y,
                                const std::vector<at::Tensor>& weights, int64_t patch_size,
                                int64_t first_pixel) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (B, 3, H, W)");
  TORCH_CHECK_VALUE(patch_size > 0 && x.size(2) % patch_size == 0 && x.size(3) % patch_size == 0,
                    "height and width must be multiples of the patch size");
  constexpr size_t others = kBeforeBlocks + kAfterBlocks;
  TORCH_CHECK_VALUE(weights.size() > others && (weights.size() - others) % kPerBlock == 0 &&
                        (weights.size() - others) / kPerBlock <= kMaxDecoderBlocks,
                    "1 to ", kMaxDecoderBlocks, " blocks of ", kPerBlock, " tensors are needed");
  PixelDecoderShape shape{};
  shape.batch = x.size(0);
  shape.height = x.size(2);
  shape.width = x.size(3);
  shape.patch_size = static_cast<int>(patch_size);
  shape.channels = static_cast<int>(weights[0].size(0));
  shape.blocks = static_cast<int>((weights.size() - others) / kPerBlock);
  shape.element = element_of(y);
  const int64_t c = shape.channels, area = patch_size * patch_size;
  TORCH_CHECK_VALUE(c == 16 || c == 32 || c == 64, "the decoder's width must be 16, 32 or 64");
  check_float(x, {shape.batch, 3, shape.height, shape.width}, "x");
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(0) % c == 0, "y must be (P·C, N)");
  shape.first_pixel = first_pixel;
  shape.pixels = y.size(0) / c;
  TORCH_CHECK_VALUE(0 <= first_pixel && first_pixel <= area - shape.pixels,
                    "the pixels of y must be of a patch");
  const int64_t tokens = shape.batch * (shape.height / patch_size) * (shape.width / patch_size);
  check(y, {shape.pixels * c, tokens}, "y");
  auto weight = weights.begin();
  const auto next = [&weight](at::IntArrayRef sizes, const char* name) {
    check_float(*weight++, sizes, name);
  };
  next({c, 3}, "rgb_weight");
  next({area, c}, "table");
  next({area * c}, "upsample_bias");
  for (int block = 0; block < shape.blocks; ++block) {
    next({c}, "norm_weight");
    next({c}, "norm_bias");
    next({3 * c, c}, "modulation_weight");
    next({3 * c}, "modulation_bias");
    next({c, c}, "fc1_weight");
    next({c}, "fc1_bias");
    next({c, c}, "fc2_weight");
    next({c}, "fc2_bias");
  }
  next({3, c}, "output_weight");
  next({3}, "output_bias");
  return shape;
}

PixelDecoderWeights pointers(const std::vector<at::Tensor>& weights, int blocks) {
  auto weight = weights.begin();
  const auto next = [&weight] { return (weight++)->const_data_ptr<float>(); };
  PixelDecoderWeights result{};
  result.rgb_weight = next();
  result.table = next();
  result.upsample_bias = next();
  for (int block = 0; block < blocks; ++block) {
    // The members of an initialiser list are evaluated from left to right.
    result.blocks[block] = {next(), next(), next(), next(), next(), next(), next(), next()};
  }
  result.output_weight = next();
  result.output_bias = next();
  return result;
}

at::Tensor packed_weights(const PixelDecoderKernels& kernels, const PixelDecoderShape& shape,
                          const PixelDecoderWeights& weights) {
  at::Tensor packed = at::empty({kernels.packed_bytes(shape)}, at::kByte);
  kernels.pack(shape, weights, packed.data_ptr());
  return packed;
}

const PixelDecoderKernels& selected_kernels() {
  return *kKernels[static_cast<int>(selected_instruction_set())];
}

}  // namespace

void pixel_decoder_forward(const at::Tensor& x, const at::Tensor& y,
                           const std::vector<at::Tensor>& weights, int64_t patch_size,
                           int64_t first_pixel, const at::Tensor& velocity) {
  const PixelDecoderKernels& kernels = selected_kernels();
  PixelDecoderForward args{};
  args.shape = checked_shape(x, y, weights, patch_size, first_pixel);
  check_float(velocity, x.sizes(), "velocity");
  if (y.numel() == 0) {
    return;
  }
  args.weights = pointers(weights, args.shape.blocks);
  const at::Tensor packed = packed_weights(kernels, args.shape, args.weights);
  args.packed = packed.const_data_ptr();
  args.x = x.const_data_ptr<float>();
  args.y = y.const_data_ptr();
  args.velocity = velocity.data_ptr<float>();
  at::parallel_for(0, kernels.chunks(args.shape), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernels.forward(args, chunk);
    }
  });
}

std::vector<at::Tensor> pixel_decoder_backward(
    const at::Tensor& grad_velocity, const at::Tensor& x, const at::Tensor& y,
    const std::vector<at::Tensor>& weights, int64_t patch_size, int64_t first_pixel,
    const at::Tensor& grad_y, const std::optional<at::Tensor>& grad_x) {
  const PixelDecoderKernels& kernels = selected_kernels();
  PixelDecoderBackward args{};
  args.shape = checked_shape(x, y, weights, patch_size, first_pixel);
  check_float(grad_velocity, x.sizes(), "grad_velocity");
  check(grad_y, y.sizes(), "grad_y");
  TORCH_CHECK_VALUE(grad_y.scalar_type() == y.scalar_type(), "grad_y must have the dtype of y");
  if (grad_x.has_value()) {
    check_float(*grad_x, x.sizes(), "grad_x");
  }
  const auto options = x.options();
  const int64_t pixels = args.shape.pixels, channels = args.shape.channels;
  std::vector<at::Tensor> grads;
  grads.reserve(weights.size());
  if (y.numel() == 0) {
    for (const at::Tensor& weight : weights) {
      grads.push_back(at::zeros_like(weight));
    }
    grads[1] = at::zeros({pixels, channels}, options);
    grads[2] = at::zeros({pixels * channels}, options);
    return grads;
  }
  const int64_t chunks = kernels.chunks(args.shape), segments = kernels.segments(args.shape);
  const int64_t size = kernels.gradient_size(args.shape);
  at::Tensor grad_table = at::empty({segments, pixels, channels}, options);
  at::Tensor grad_upsample_bias = at::empty({segments, pixels * channels}, options);
  const at::Tensor partials = at::empty({chunks, size}, options);
  const at::Tensor gradients = at::empty({size}, options);
  args.weights = pointers(weights, args.shape.blocks);
  const at::Tensor packed = packed_weights(kernels, args.shape, args.weights);
  args.packed = packed.const_data_ptr();
  args.x = x.const_data_ptr<float>();
  args.y = y.const_data_ptr();
  args.grad_velocity = grad_velocity.const_data_ptr<float>();
  args.grad_x = grad_x.has_value() ? grad_x->data_ptr<float>() : nullptr;
  args.grad_y = grad_y.data_ptr();
  args.grad_table = grad_table.data_ptr<float>();
  args.grad_upsample_bias = grad_upsample_bias.data_ptr<float>();
  args.partials = partials.data_ptr<float>();
  args.gradients = gradients.data_ptr<float>();
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernels.backward(args, chunk);
    }
  });
  at::parallel_for(0, size, kReducedPerTask, [&](int64_t begin, int64_t end) {
    kernels.reduce(args, begin, end);
  });

  int64_t offset = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (i == 1) {
      grads.push_back(grad_table.sum(0));
    } else if (i == 2) {
      grads.push_back(grad_upsample_bias.sum(0));
    } else {
      const int64_t count = weights[i].numel();
      grads.push_back(gradients.narrow(0, offset, count).view(weights[i].sizes()));
      offset += count;
    }
  }
  TORCH_INTERNAL_ASSERT(offset == size);
  return grads;
}

}  // namespace deco
