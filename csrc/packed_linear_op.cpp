#include "packed_linear_op.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>

#include <algorithm>
#include <vector>

#include "instruction_set.h"
#include "packed_linear.h"
#include "tensors.h"

namespace deco {
namespace {

constexpr const PackedLinearKernel* kKernels[] = DECO_KERNELS(packed_linear);
// Rows of x that meet a block of the weight at a time, and how much of the depth in float32: both
// stay in a second cache of half a megabyte. In bfloat16 parts of the depth gain nothing.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTileDepth = 512;

at::Tensor packed(const at::Tensor& weight) {
  const int64_t rows = weight.size(0), depth = weight.size(1);
  const int64_t blocks = (rows + kTileColumns - 1) / kTileColumns;
  const int64_t pair = weight.scalar_type() == at::kFloat ? 1 : 2;
  TORCH_CHECK_VALUE(depth % pair == 0, "the depth of a bfloat16 product must be even, not ", depth);
  return at::constant_pad_nd(weight, {0, 0, 0, blocks * kTileColumns - rows})
      .view({blocks, kTileColumns, depth / pair, pair})
      .permute({0, 2, 1, 3})
      .contiguous()
      .view({blocks, depth, kTileColumns});
}

#ifdef CPUBLAS_BRGEMM_F32F32F32
// sums (rows, 64) = or += x (rows, depth) times a block of a weight (depth, 64).
template <class T>
void multiply(const at::Tensor& x, int64_t first_row, const at::Tensor& weight, int64_t block,
              int64_t rows, bool add, float* sums) {
  const int64_t depth = x.size(-1);
  constexpr bool pairs = !std::is_same_v<T, float>;
  const T* left = x.const_data_ptr<T>() + first_row * depth;
  const T* right = weight.const_data_ptr<T>() + block * depth * kTileColumns;
  const int64_t parts = pairs ? 1 : std::max<int64_t>((depth + kTileDepth - 1) / kTileDepth, 1);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = depth * part / parts, end = depth * (part + 1) / parts;
    at::native::cpublas::brgemm(rows, kTileColumns, end - first, depth, kTileColumns, kTileColumns,
                                add || part > 0, left + first, right + first * kTileColumns, sums,
                                pairs);
  }
}
#endif

}  // namespace

#ifdef CPUBLAS_BRGEMM_F32F32F32
bool has_block_products() { return true; }
#else
bool has_block_products() { return false; }
#endif

at::Tensor pack_weight(const at::Tensor& weight, bool split) {
  if (!split) {
    return packed(weight).unsqueeze(0);
  }
  const at::Tensor high = weight.to(at::kBFloat16);
  const at::Tensor low = at::sub(weight, high).to(at::kBFloat16);
  return at::stack({packed(high), packed(low)});
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, int64_t out_features, bool swiglu) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  const int64_t rows = x.size(0), depth = x.size(1), parts = weight.size(0);
  const int64_t blocks = (out_features + kTileColumns - 1) / kTileColumns;
  const Element element = element_of(x);
  const bool split = parts == 2;
  check(x, {rows, depth}, "x");
  check(weight, {split ? 2 : 1, blocks, depth, kTileColumns}, "weight");
  TORCH_CHECK_VALUE(weight.scalar_type() == (split ? at::kBFloat16 : x.scalar_type()) &&
                        (!split || element == Element::float32),
                    "a weight packed as ", weight.scalar_type(), " does not fit x in ",
                    x.scalar_type());
  if (bias) {
    check_float(*bias, {out_features}, "bias");
  }
  TORCH_CHECK_VALUE(!swiglu || (!bias && out_features % kTileColumns == 0),
                    "swiglu takes whole blocks and no bias");

  const PackedLinearKernel& kernel = *kKernels[static_cast<int>(selected_instruction_set())];
  at::Tensor x_parts = x;
  if (split) {
    x_parts = at::empty({2, rows, depth}, x.options().dtype(at::kBFloat16));
    auto* high = x_parts.data_ptr<at::BFloat16>();
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      kernel.split(x.const_data_ptr<float>() + begin * depth, high + begin * depth,
                   high + (rows + begin) * depth, (end - begin) * depth);
    });
  }

  const int64_t width = swiglu ? out_features / 2 : out_features;
  const int64_t tile_width = swiglu ? kTileColumns / 2 : kTileColumns;
  at::Tensor result = at::empty({rows, width}, x.options());
  auto* results = static_cast<char*>(result.data_ptr());
  const float* biases = bias ? bias->const_data_ptr<float>() : nullptr;
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  at::parallel_for(0, blocks * row_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(kTileRows * kTileColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / row_tiles, first = task % row_tiles * kTileRows;
      const int64_t count = std::min(kTileRows, rows - first);
      if (split) {
        multiply<at::BFloat16>(x_parts, first, weight, block, count, false, sums.data());
        multiply<at::BFloat16>(x_parts, first, weight, blocks + block, count, true, sums.data());
        multiply<at::BFloat16>(x_parts, rows + first, weight, block, count, true, sums.data());
      } else if (element == Element::float32) {
        multiply<float>(x_parts, first, weight, block, count, false, sums.data());
      } else {
        multiply<at::BFloat16>(x_parts, first, weight, block, count, false, sums.data());
      }
      PackedLinearTile tile{};
      tile.sums = sums.data();
      tile.rows = count;
      tile.columns = std::min(tile_width, width - block * tile_width);
      tile.bias = biases ? biases + block * kTileColumns : nullptr;
      tile.activation = swiglu ? Activation::swiglu : Activation::none;
      tile.element = element;
      tile.results = results + result.element_size() * (first * width + block * tile_width);
      tile.stride = width;
      kernel.finish(tile);
    }
    at::native::cpublas::brgemm_release();
  });
  return result;
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false, "this torch has no block products");
#endif
}

}  // namespace deco
