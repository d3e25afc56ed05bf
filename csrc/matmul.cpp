// The kernels of matmul.h for one instruction set, DECO_NAMESPACE.
//
// The elements of both operands have 32 bits: a float32, or, where the processor has dot products
// of bfloat16, two neighbours along the depth. Without these bfloat16 is widened.
#include "matmul.h"

#include "vector.h"

namespace deco::DECO_NAMESPACE {
namespace {

// Sums in registers, beside a row of the panel: 16 of 32 with AVX-512, else 12 of 16.
constexpr int kWide = 2;
constexpr int kHigh = kLanes == 16 ? 8 : 6;
constexpr int kColumns = kWide * kLanes;
constexpr int kRows = 8 * kHigh;
constexpr int64_t kDepth = 1024;
static_assert(kRows % kLanes == 0);

#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Elements of 32 bits ----------------------------------------------------------------------

// What T becomes in an operand.
template <class T>
struct Widened {
  static constexpr int kPack = 1;

  // The k-th elements of `count` rows that lie side by side.
  DECO_INLINE static Vector across(const T* data, int64_t stride, int64_t k, int64_t /*depth*/,
                                   int64_t count) {
    return load_some(data + k * stride, count);
  }
  // The elements k, k + 1, … of one row.
  DECO_INLINE static Vector along(const T* row, int64_t k, int64_t depth) {
    return load_some(row + k, depth - k);
  }
};

#ifdef __AVX512BF16__
// Two neighbours along the depth, with a zero after the last one of an odd depth.
struct Pairs {
  static constexpr int kPack = 2;

  DECO_INLINE static Vector across(const BFloat16* data, int64_t stride, int64_t k, int64_t depth,
                                   int64_t count) {
    const BFloat16* even = data + 2 * k * stride;
    const Vector low = load_some(even, count);
    const Vector high = 2 * k + 1 < depth ? load_some(even + stride, count) : Vector{};
    return bits_of<Vector>(bits_of<UIntVector>(low) >> 16 | bits_of<UIntVector>(high));
  }
  DECO_INLINE static Vector along(const BFloat16* row, int64_t k, int64_t depth) {
    if (depth - 2 * k >= 2 * kLanes) {
      return load_bits(row + 2 * k);
    }
    BFloat16 some[2 * kLanes] = {};
    if (depth > 2 * k) {
      __builtin_memcpy(some, row + 2 * k, sizeof(BFloat16) * (depth - 2 * k));
    }
    return load_bits(some);
  }
};
#endif

template <bool pairs>
DECO_INLINE void accumulate(Vector& sum, const float* left, Vector right) {
#ifdef __AVX512BF16__
  if constexpr (pairs) {
    sum = add_products_of_pairs(sum, left, right);
    return;
  }
#endif
  sum += *left * right;
}

// ---- Packing ----------------------------------------------------------------------------------

// A panel, (depth, kColumns): the rows of B cut to its columns, or columns of B turned.
template <class T, class Packed>
void pack_panel(const MatmulPanel& args) {
  const auto* data = static_cast<const T*>(args.b.data);
  const int64_t depth = ceil_divide(args.depth, Packed::kPack);
  for (int v = 0; v < kWide; ++v) {
    const int64_t first = v * kLanes, count = args.count - first;
    float* to = args.panel + first;
    if (args.b.column_stride == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        store(to + k * kColumns,
              count > 0 ? Packed::across(data + first, args.b.row_stride, k, args.depth, count)
                        : Vector{});
      }
      continue;
    }
    for (int64_t k = 0; k < depth; k += kLanes) {
      UIntVector block[kLanes] = {};
      for (int i = 0; i < smaller(kLanes, count); ++i) {
        block[i] = bits_of<UIntVector>(
            Packed::along(data + (first + i) * args.b.column_stride, k, args.depth));
      }
      transpose_step<1>(block);
      for (int i = 0; i < smaller(kLanes, depth - k); ++i) {
        store(to + (k + i) * kColumns, bits_of<Vector>(block[i]));
      }
    }
  }
}

// Rows of A, with zeros for those that are missing, as (rows, stride): along the depth.
template <class T, class Packed>
void copy_rows(const MatmulTask& task, int64_t stride, float* to) {
  const auto* data = static_cast<const T*>(task.a.data);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < stride; k += kLanes) {
      store(to + row * stride + k,
            row < task.rows ? Packed::along(data + row * task.a.row_stride, k, task.depth)
                            : Vector{});
    }
  }
}

// Rows of A that lie side by side, as (kRows / kHigh, depth, kHigh).
template <class T, class Packed>
void interleave_rows(const MatmulTask& task, float* to) {
  const auto* data = static_cast<const T*>(task.a.data);
  const int64_t depth = ceil_divide(task.depth, Packed::kPack);
  for (int64_t k = 0; k < depth; ++k) {
    alignas(64) float column[kRows];
    for (int64_t row = 0; row < kRows; row += kLanes) {
      const int64_t count = task.rows - row;
      store(column + row, count > 0 ? Packed::across(data + row, task.a.column_stride, k,
                                                     task.depth, count)
                                    : Vector{});
    }
    for (int64_t row = 0; row < kRows; row += kHigh) {
      __builtin_memcpy(to + row * depth + k * kHigh, column + row, sizeof(float) * kHigh);
    }
  }
}

// ---- Multiplying ------------------------------------------------------------------------------

// Of the left operand: where the element (row, k) of kHigh rows lies from the first one.
template <bool interleaved>
struct Left {
  const float* data;
  int64_t stride;  // from row to row, or from kHigh rows to the next
  DECO_INLINE const float* rows(int64_t row, int64_t k) const {
    return interleaved ? data + row / kHigh * stride + k * kHigh : data + row * stride + k;
  }
};

template <bool pairs, bool interleaved>
DECO_INLINE void multiply_block(const float* left, int64_t stride, const float* panel,
                                int64_t depth, bool add, float* to) {
  Vector sums[kHigh][kWide] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vector factors[kWide];
#pragma GCC unroll 2
    for (int j = 0; j < kWide; ++j) {
      factors[j] = load(panel + k * kColumns + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kHigh; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kWide; ++j) {
        accumulate<pairs>(sums[i][j], interleaved ? left + k * kHigh + i : left + i * stride + k,
                          factors[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHigh; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kWide; ++j) {
      float* sum = to + i * kColumns + j * kLanes;
      store(sum, add ? load(sum) + sums[i][j] : sums[i][j]);
    }
  }
}

template <class T>
void write(const MatmulTask& task, const float* sums, int64_t column) {
  const int64_t columns = smaller(kColumns, task.columns - column);
  for (int64_t row = 0; row < task.rows; ++row) {
    T* to = static_cast<T*>(task.c) + row * task.c_stride + column;
    for (int64_t i = 0; i < columns; i += kLanes) {
      Vector value = load(sums + row * kColumns + i);
      if (task.add) {
        value += load_some(to + i, columns - i);
      }
      store_some(to + i, value, columns - i);
    }
  }
}

template <bool pairs, bool interleaved>
void multiply_rows(const MatmulTask& task, const Left<interleaved>& left, int64_t depth) {
  alignas(64) float sums[kRows * kColumns] = {};
  // Equal parts of the depth.
  const int64_t parts = ceil_divide(depth, kDepth);
  const float* panel = task.panels;
  for (int64_t column = 0; column < task.columns; column += kColumns) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = depth * part / parts;
      const int64_t count = depth * (part + 1) / parts - first;
      for (int64_t row = 0; row < task.rows; row += kHigh) {
        multiply_block<pairs, interleaved>(left.rows(row, first), left.stride,
                                           panel + first * kColumns, count, part > 0,
                                           sums + row * kColumns);
      }
    }
    if (task.c_element == Element::float32) {
      write<float>(task, sums, column);
    } else {
      write<BFloat16>(task, sums, column);
    }
    panel += depth * kColumns;
  }
}

template <class T, class Packed>
void multiply_as(const MatmulTask& task) {
  constexpr bool pairs = Packed::kPack == 2;
  const int64_t depth = ceil_divide(task.depth, Packed::kPack);
  if (task.a.column_stride != 1) {
    interleave_rows<T, Packed>(task, task.workspace);
    return multiply_rows<pairs>(task, Left<true>{task.workspace, depth * kHigh}, depth);
  }
  // As they lie, where they are whole elements of 32 bits and none is missing.
  const bool whole = sizeof(T) * Packed::kPack == sizeof(float) &&
                     task.depth % Packed::kPack == 0 && task.a.row_stride % Packed::kPack == 0 &&
                     reinterpret_cast<uintptr_t>(task.a.data) % alignof(float) == 0;
  if (whole && task.rows % kHigh == 0) {
    const auto* rows = static_cast<const float*>(task.a.data);
    return multiply_rows<pairs>(task, Left<false>{rows, task.a.row_stride / Packed::kPack}, depth);
  }
  const int64_t stride = ceil_divide(depth, kLanes) * kLanes;
  copy_rows<T, Packed>(task, stride, task.workspace);
  multiply_rows<pairs>(task, Left<false>{task.workspace, stride}, depth);
}

// Calls f with the type of the elements and what becomes of them.
template <class F>
auto with_operand(Element element, F&& f) {
#ifdef __AVX512BF16__
  if (element == Element::bfloat16) {
    return f(BFloat16(), Pairs());
  }
#endif
  return element == Element::bfloat16 ? f(BFloat16(), Widened<BFloat16>())
                                      : f(float(), Widened<float>());
}

// ---- The table --------------------------------------------------------------------------------

int64_t packed_depth(Element element, int64_t depth) {
  return kHasPairs && element == Element::bfloat16 ? ceil_divide(depth, 2) : depth;
}

int64_t panel_size(Element element, int64_t depth) {
  return packed_depth(element, depth) * kColumns;
}

int64_t workspace_size(Element element, int64_t depth) {
  return kRows * ceil_divide(packed_depth(element, depth), kLanes) * kLanes;
}

void pack(const MatmulPanel& args) {
  with_operand(args.element, [&](auto element, auto packed) {
    pack_panel<decltype(element), decltype(packed)>(args);
  });
}

void multiply(const MatmulTask& task) {
  with_operand(task.element, [&](auto element, auto packed) {
    multiply_as<decltype(element), decltype(packed)>(task);
  });
}

}  // namespace

extern const MatmulKernel matmul = {
    .rows = kRows,
    .columns = kColumns,
    .panel_size = panel_size,
    .workspace_size = workspace_size,
    .pack = pack,
    .multiply = multiply,
};

}  // namespace deco::DECO_NAMESPACE
