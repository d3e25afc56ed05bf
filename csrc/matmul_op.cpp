#include "matmul_op.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "instruction_set.h"
#include "matmul.h"
#include "tensors.h"

namespace deco {
namespace {

constexpr const MatmulKernel* kKernels[] = DECO_KERNELS(matmul);
// Of the panels that exist at a time: a large b is not copied whole.
constexpr int64_t kPackedNumbers = 4 << 20;
constexpr int64_t kTasksPerThread = 4;

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part of a tensor (rows, columns) that begins at a row and a column.
MatmulOperand operand(const at::Tensor& tensor, int64_t row, int64_t column) {
  const int64_t offset = row * tensor.stride(0) + column * tensor.stride(1);
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  return {data + offset * tensor.element_size(), tensor.stride(0), tensor.stride(1)};
}

void check_operand(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU");
  TORCH_CHECK_VALUE(tensor.dim() == 2 && (tensor.stride(0) == 1 || tensor.stride(1) == 1), name,
                    " must be a matrix with a stride of 1");
}

}  // namespace

bool prefers_matmul(const at::Tensor& a) {
#if defined(__x86_64__)
  const InstructionSet instruction_set = selected_instruction_set();
  return element_of(a) == Element::bfloat16
             ? instruction_set != InstructionSet::amx
             : instruction_set != InstructionSet::baseline && !is_made_by_intel();
#else
  return false;
#endif
}

void matmul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, bool add) {
  check_operand(a, "a");
  check_operand(b, "b");
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  TORCH_CHECK_VALUE(b.size(0) == depth, "b must have ", depth, " rows");
  const Element element = element_of(a), c_element = element_of(c);
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type(), "a and b must have one dtype");
  check(c, {rows, columns}, "c");
  if (c.numel() == 0) {
    return;
  }

  const MatmulKernel& kernel = *kKernels[static_cast<int>(selected_instruction_set())];
  const int64_t panel_size = kernel.panel_size(element, depth);
  const int64_t panels = std::clamp<int64_t>(kPackedNumbers / std::max<int64_t>(panel_size, 1), 1,
                                             ceil_divide(columns, kernel.columns));
  const int64_t packed_columns = panels * kernel.columns;
  const auto options = at::TensorOptions(at::kFloat);
  const at::Tensor packed = at::empty({panels * panel_size}, options);
  float* const panel_data = packed.data_ptr<float>();
  auto* const c_data = static_cast<char*>(c.data_ptr());
  const int64_t row_blocks = ceil_divide(rows, kernel.rows);
  for (int64_t first = 0; first < columns; first += packed_columns) {
    const int64_t width = std::min(packed_columns, columns - first);
    const int64_t count = ceil_divide(width, kernel.columns);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        MatmulPanel panel{};
        panel.b = operand(b, 0, first + i * kernel.columns);
        panel.element = element;
        panel.depth = depth;
        panel.count = std::min(kernel.columns, width - i * kernel.columns);
        panel.panel = panel_data + i * panel_size;
        kernel.pack(panel);
      }
    });
    // With few rows, tasks of fewer panels: enough for all threads.
    const int64_t wanted = ceil_divide(kTasksPerThread * at::get_num_threads(), row_blocks);
    const int64_t parts = std::clamp<int64_t>(wanted, 1, count);
    at::parallel_for(0, row_blocks * parts, 1, [&](int64_t begin, int64_t end) {
      const at::Tensor workspace = at::empty({kernel.workspace_size(element, depth)}, options);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / parts * kernel.rows, part = i % parts;
        const int64_t panel = count * part / parts, next = count * (part + 1) / parts;
        const int64_t column = panel * kernel.columns;
        MatmulTask task{};
        task.a = operand(a, row, 0);
        task.element = element;
        task.depth = depth;
        task.rows = std::min(kernel.rows, rows - row);
        task.panels = panel_data + panel * panel_size;
        task.columns = std::min(next * kernel.columns, width) - column;
        task.c = c_data + c.element_size() * (row * columns + first + column);
        task.c_stride = columns;
        task.c_element = c_element;
        task.add = add;
        task.workspace = workspace.data_ptr<float>();
        kernel.multiply(task);
      }
    });
  }
}

}  // namespace deco
