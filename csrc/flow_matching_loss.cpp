#include "flow_matching_loss.h"

#include <cstring>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace deco::DECO_NAMESPACE {
namespace {

constexpr int kBlock = 8;
// A register holds a row of this many neighbouring blocks.
constexpr int kGroup = kLanes >= 2 * kBlock ? 2 : 1;
constexpr int kRow = kBlock * kGroup;
typedef float Row __attribute__((vector_size(4 * kRow)));
typedef int32_t RowIndex __attribute__((vector_size(4 * kRow)));

// A tile is a row of this many blocks. The last of an image takes the padded blocks too, and so
// may have one more in each direction: padding reflects into the block before and never further.
constexpr int kTileBlocks = 32;
constexpr int kMaxRows = 2 * kBlock;
constexpr int kStride = (kTileBlocks + 2) * kBlock;  // a multiple of kRow

using Plane = float[kMaxRows][kStride];

// Full-range JPEG (JFIF) conversion, rows Y, Cb, Cr.
constexpr float kYCbCr[3][3] = {
    {0.299f, 0.587f, 0.114f}, {-0.168736f, -0.331264f, 0.5f}, {0.5f, -0.418688f, -0.081312f}};

// cos(kπ/16)/2, the entries of the orthonormal 8-point DCT-II matrix.
constexpr float c1 = 0.49039264020161522f, c2 = 0.46193976625564337f, c3 = 0.41573480615127262f,
                c4 = 0.35355339059327376f, c5 = 0.27778511650980111f, c6 = 0.19134171618254489f,
                c7 = 0.09754516100806413f;

DECO_INLINE float to_float(float value) { return value; }

DECO_INLINE float to_float(BFloat16 value) {
  return bits_of<float>(static_cast<uint32_t>(value.bits) << 16);
}

DECO_INLINE void from_float(float value, float& to) { to = value; }

// Rounds to the nearest, ties to even; a NaN stays one.
DECO_INLINE void from_float(float value, BFloat16& to) {
  const auto bits = bits_of<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40);
}

template <class T>
DECO_INLINE Row load_row(const T* from) {
  Vector parts[kRow / kLanes];
#pragma GCC unroll 2
  for (int i = 0; i < kRow / kLanes; ++i) {
    parts[i] = load(from + i * kLanes);
  }
  Row row;
  __builtin_memcpy(&row, parts, sizeof row);
  return row;
}

template <class T>
DECO_INLINE void store_row(T* to, const Row& row) {
  Vector parts[kRow / kLanes];
  __builtin_memcpy(parts, &row, sizeof row);
#pragma GCC unroll 2
  for (int i = 0; i < kRow / kLanes; ++i) {
    store(to + i * kLanes, parts[i]);
  }
}

// Even coefficients see only the sums of mirrored elements, odd ones only the differences.
DECO_INLINE void dct(Row (&x)[kBlock]) {
  const Row a0 = x[0] + x[7], a1 = x[1] + x[6], a2 = x[2] + x[5], a3 = x[3] + x[4];
  const Row b0 = x[0] - x[7], b1 = x[1] - x[6], b2 = x[2] - x[5], b3 = x[3] - x[4];
  const Row s0 = a0 + a3, s1 = a1 + a2, d0 = a0 - a3, d1 = a1 - a2;
  x[0] = c4 * (s0 + s1);
  x[1] = c1 * b0 + c3 * b1 + c5 * b2 + c7 * b3;
  x[2] = c2 * d0 + c6 * d1;
  x[3] = c3 * b0 - c7 * b1 - c1 * b2 - c5 * b3;
  x[4] = c4 * (s0 - s1);
  x[5] = c5 * b0 - c1 * b1 + c7 * b2 + c3 * b3;
  x[6] = c6 * d0 - c2 * d1;
  x[7] = c7 * b0 - c5 * b1 + c3 * b2 - c1 * b3;
}

DECO_INLINE void inverse_dct(Row (&x)[kBlock]) {
  const Row s0 = c4 * (x[0] + x[4]), s1 = c4 * (x[0] - x[4]);
  const Row d0 = c2 * x[2] + c6 * x[6], d1 = c6 * x[2] - c2 * x[6];
  const Row a0 = s0 + d0, a1 = s1 + d1, a2 = s1 - d1, a3 = s0 - d0;
  const Row b0 = c1 * x[1] + c3 * x[3] + c5 * x[5] + c7 * x[7];
  const Row b1 = c3 * x[1] - c7 * x[3] - c1 * x[5] - c5 * x[7];
  const Row b2 = c5 * x[1] - c1 * x[3] + c7 * x[5] + c3 * x[7];
  const Row b3 = c7 * x[1] - c5 * x[3] + c3 * x[5] - c1 * x[7];
  x[0] = a0 + b0;
  x[1] = a1 + b1;
  x[2] = a2 + b2;
  x[3] = a3 + b3;
  x[4] = a3 - b3;
  x[5] = a2 - b2;
  x[6] = a1 - b1;
  x[7] = a0 - b0;
}

template <int... lane>
DECO_INLINE Row shuffle_rows(const Row& a, const Row& b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, RowIndex{lane...});
#endif
}

// Swaps, in each pair of rows that lie `distance` apart, the off-diagonal parts of that size.
template <int distance, int... lane>
DECO_INLINE void transpose_step(Row (&x)[kBlock], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i) {
    if ((i & distance) == 0) {
      const Row a = x[i], b = x[i + distance];
      x[i] = shuffle_rows(
          a, b,
          std::integer_sequence<int, (lane & distance ? lane - distance + kRow : lane)...>());
      x[i + distance] = shuffle_rows(
          a, b,
          std::integer_sequence<int, (lane & distance ? lane + kRow : lane + distance)...>());
    }
  }
}

// Transposes each of the blocks that lie beside each other in x.
DECO_INLINE void transpose_blocks(Row (&x)[kBlock]) {
  constexpr auto lanes = std::make_integer_sequence<int, kRow>();
  transpose_step<1>(x, lanes);
  transpose_step<2>(x, lanes);
  transpose_step<4>(x, lanes);
}

// The quadratic form of the frequency term in the coefficients of the colours, YCbCrᵀ diag(table)
// YCbCr for each frequency, as the transform leaves those: transposed, once for each block of a
// group. So no colour needs converting.
struct Weights {
  Row form[kBlock][3][3];

  explicit Weights(const float* table) {
    for (int v = 0; v < kBlock; ++v) {
      for (int lane = 0; lane < kRow; ++lane) {
        for (int a = 0; a < 3; ++a) {
          for (int b = 0; b < 3; ++b) {
            float sum = 0;
            for (int component = 0; component < 3; ++component) {
              const int u = lane % kBlock;
              sum += table[(component * kBlock + u) * kBlock + v] * kYCbCr[component][a] *
                     kYCbCr[component][b];
            }
            form[v][a][b][lane] = sum;
          }
        }
      }
    }
  }
};

DECO_INLINE void to_coefficients(Row (&x)[kBlock]) {
  dct(x);
  transpose_blocks(x);
  dct(x);
}

DECO_INLINE void from_coefficients(Row (&x)[kBlock]) {
  inverse_dct(x);
  transpose_blocks(x);
  inverse_dct(x);
}

struct Sums {
  Row squares{};    // d²
  Row frequency{};  // table ∘ C²
};

// What the two terms are multiplied by in the gradient.
struct Scales {
  float difference;
  float frequency;
};

// Adds a group of blocks, rows read(colour, row) of the difference, to the sums, and hands
// scales.difference · d + scales.frequency · YCbCrᵀ(DCTᵀ(table ∘ C)) to write(colour, row, value)
// where it is wanted. Σd² and the multiple of d are taken from the coefficients, which are at
// hand: the transform is orthonormal.
template <bool with_gradient, class Read, class Write>
DECO_INLINE void transform(const Weights& weights, const Scales& scales, Sums& sums, Read&& read,
                           Write&& write) {
  Row x[3][kBlock];
#pragma GCC unroll 1
  for (int colour = 0; colour < 3; ++colour) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) {
      x[colour][i] = read(colour, i);
    }
    to_coefficients(x[colour]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i) {
    const Row c[3] = {x[0][i], x[1][i], x[2][i]};
#pragma GCC unroll 3
    for (int colour = 0; colour < 3; ++colour) {
      const Row* form = weights.form[i][colour];
      const Row weighted = form[0] * c[0] + form[1] * c[1] + form[2] * c[2];
      sums.squares += c[colour] * c[colour];
      sums.frequency += weighted * c[colour];
      x[colour][i] = scales.difference * c[colour] + scales.frequency * weighted;
    }
  }
  if constexpr (with_gradient) {
#pragma GCC unroll 1
    for (int colour = 0; colour < 3; ++colour) {
      from_coefficients(x[colour]);
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) {
        write(colour, i, x[colour][i]);
      }
    }
  }
}

// Where element `place` of a padded side lies in the `size` there are.
inline int reflect(int place, int size) {
  const int period = size > 1 ? 2 * (size - 1) : 1;
  place %= period;
  const int mirrored = period - place;
  const int nearest = place < mirrored ? place : mirrored;
  return nearest < size ? nearest : size - 1;
}

struct Tile {
  int64_t image;
  int64_t top;
  int64_t left;
  int rows;  // of pixels
  int columns;
  int padded_rows;  // multiples of 8
  int padded_columns;
};

struct Grid {
  int64_t block_rows, block_columns;  // whole ones, but at least one
  int64_t columns;                    // of tiles

  explicit Grid(const FlowMatchingLoss& loss)
      : block_rows(loss.height < kBlock ? 1 : loss.height / kBlock),
        block_columns(loss.width < kBlock ? 1 : loss.width / kBlock),
        columns((block_columns + kTileBlocks - 1) / kTileBlocks) {}

  int64_t tiles_per_image() const { return block_rows * columns; }
};

int round_up_to_block(int size) { return (size + kBlock - 1) / kBlock * kBlock; }

Tile tile_at(const FlowMatchingLoss& loss, int64_t index) {
  const Grid grid(loss);
  const int64_t row = index % grid.tiles_per_image() / grid.columns;
  const int64_t column = index % grid.columns;
  Tile tile{};
  tile.image = index / grid.tiles_per_image();
  tile.top = row * kBlock;
  tile.left = column * kTileBlocks * kBlock;
  const bool last_row = row == grid.block_rows - 1;
  const bool last_column = column == grid.columns - 1;
  tile.rows = static_cast<int>(last_row ? loss.height - tile.top : kBlock);
  tile.columns = static_cast<int>(last_column ? loss.width - tile.left : kTileBlocks * kBlock);
  tile.padded_rows = round_up_to_block(tile.rows);
  tile.padded_columns = round_up_to_block(tile.columns);
  return tile;
}

int64_t offset_of(const FlowMatchingLoss& loss, const Tile& tile, int colour, int row) {
  return ((tile.image * 3 + colour) * loss.height + tile.top + row) * loss.width + tile.left;
}

// Reads the tile, pads it, fills it up to a whole group of blocks with zeros, and returns the sum
// of squares of what is not padding.
template <class Prediction, class Target>
float read(const FlowMatchingLoss& loss, const Tile& tile, Plane (&difference)[3]) {
  const int filled = (tile.padded_columns + kRow - 1) / kRow * kRow;
  float sum = 0;
  for (int colour = 0; colour < 3; ++colour) {
    for (int row = 0; row < tile.rows; ++row) {
      const int64_t offset = offset_of(loss, tile, colour, row);
      const auto* prediction = static_cast<const Prediction*>(loss.prediction) + offset;
      const auto* target = static_cast<const Target*>(loss.target) + offset;
      float* to = difference[colour][row];
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < tile.columns; ++i) {
        to[i] = to_float(prediction[i]) - to_float(target[i]);
        sum += to[i] * to[i];
      }
      for (int i = tile.columns; i < tile.padded_columns; ++i) {
        to[i] = to[reflect(i, tile.columns)];
      }
      for (int i = tile.padded_columns; i < filled; ++i) {
        to[i] = 0;
      }
    }
    for (int row = tile.rows; row < tile.padded_rows; ++row) {
      std::memcpy(difference[colour][row], difference[colour][reflect(row, tile.rows)],
                  sizeof(float) * filled);
    }
  }
  return sum;
}

// The transpose of padding: what reached a padded pixel belongs to the one it was copied from.
void fold(const Tile& tile, Plane& gradient) {
  for (int row = tile.rows; row < tile.padded_rows; ++row) {
    for (int i = 0; i < tile.padded_columns; ++i) {
      gradient[reflect(row, tile.rows)][i] += gradient[row][i];
    }
  }
  for (int row = 0; row < tile.rows; ++row) {
    for (int i = tile.columns; i < tile.padded_columns; ++i) {
      gradient[row][reflect(i, tile.columns)] += gradient[row][i];
    }
  }
}

template <class Prediction>
void write(const FlowMatchingLoss& loss, const Tile& tile, const Plane (&difference)[3],
           Plane (&gradient)[3], const Scales& scales) {
  for (int colour = 0; colour < 3; ++colour) {
    fold(tile, gradient[colour]);
    for (int row = 0; row < tile.rows; ++row) {
      auto* to = static_cast<Prediction*>(loss.gradient) + offset_of(loss, tile, colour, row);
      const float* d = difference[colour][row];
      const float* g = gradient[colour][row];
#pragma omp simd
      for (int i = 0; i < tile.columns; ++i) {
        from_float(scales.difference * d[i] + g[i], to[i]);
      }
    }
  }
}

float sum_of(const Row& row) {
  float sum = 0;
  for (int lane = 0; lane < kRow; ++lane) {
    sum += row[lane];
  }
  return sum;
}

// Three groups before they are needed, into the second cache: the first has too few places for what
// is under way.
constexpr int kAhead = 3 * kRow;

template <class T>
DECO_INLINE void prefetch(T* place) {
  constexpr int kToWrite = !std::is_const_v<T>, kSecondCache = 2;
  __builtin_prefetch(place, kToWrite, kSecondCache);
}

// A tile of whole groups, straight from memory to memory. The next tile is `to_next` elements away.
template <bool with_gradient, class Prediction, class Target>
void run_whole(const FlowMatchingLoss& loss, const Tile& tile, const Weights& weights,
               const Scales& scales, int64_t to_next, double* partials) {
  const int64_t first = offset_of(loss, tile, 0, 0);
  const int64_t plane = loss.height * loss.width;
  Sums sums;
  for (int left = 0; left < tile.columns; left += kRow) {
    const auto* prediction = static_cast<const Prediction*>(loss.prediction) + first + left;
    const auto* target = static_cast<const Target*>(loss.target) + first + left;
    auto* gradient = static_cast<Prediction*>(loss.gradient) + first + left;
    // The processor follows too few of the 72 rows by itself, and none of them to the next tile.
    const int64_t ahead =
        left + kAhead < tile.columns ? kAhead : kAhead + to_next - tile.columns;
    transform<with_gradient>(
        weights, scales, sums,
        [&](int colour, int row) DECO_LAMBDA {
          const int64_t offset = colour * plane + row * loss.width;
          prefetch(prediction + offset + ahead);
          prefetch(target + offset + ahead);
          return load_row(prediction + offset) - load_row(target + offset);
        },
        [&](int colour, int row, const Row& value) DECO_LAMBDA {
          auto* to = gradient + colour * plane + row * loss.width;
          prefetch(to + ahead);
          store_row(to, value);
        });
  }
  partials[0] = sum_of(sums.squares);
  partials[1] = sum_of(sums.frequency);
}

// A tile with padding or half a group, by way of planes.
template <bool with_gradient, class Prediction, class Target>
void run_padded(const FlowMatchingLoss& loss, const Tile& tile, const Weights& weights,
                const Scales& scales, double* partials) {
  alignas(64) Plane difference[3];
  alignas(64) Plane gradient[3];
  partials[0] = read<Prediction, Target>(loss, tile, difference);
  Sums sums;
  for (int top = 0; top < tile.padded_rows; top += kBlock) {
    for (int left = 0; left < tile.padded_columns; left += kRow) {
      // The multiple of d is left to `write`: a pixel has it once, however often it is copied.
      transform<with_gradient>(
          weights, {0, scales.frequency}, sums,
          [&](int colour, int row) DECO_LAMBDA {
            return load_row(&difference[colour][top + row][left]);
          },
          [&](int colour, int row, const Row& value) DECO_LAMBDA {
            store_row(&gradient[colour][top + row][left], value);
          });
    }
  }
  partials[1] = sum_of(sums.frequency);
  if constexpr (with_gradient) {
    write<Prediction>(loss, tile, difference, gradient, scales);
  }
}

template <bool with_gradient, class Prediction, class Target>
void run_as(const FlowMatchingLoss& loss, int64_t begin, int64_t end) {
  const Weights weights(loss.table);
  const double images = 3.0 * static_cast<double>(loss.batch);
  const double values = images * static_cast<double>(loss.height) * static_cast<double>(loss.width);
  const int64_t padded_height = (loss.height + kBlock - 1) / kBlock * kBlock;
  const int64_t padded_width = (loss.width + kBlock - 1) / kBlock * kBlock;
  const double coefficients =
      images * static_cast<double>(padded_height) * static_cast<double>(padded_width);
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = tile_at(loss, index);
    const double timestep_weight = loss.timestep_weight ? loss.timestep_weight[tile.image] : 1.0;
    const Scales scales = {static_cast<float>(2.0 * timestep_weight / values),
                           static_cast<float>(2.0 * loss.weight / coefficients)};
    double* partials = loss.partials + 2 * index;
    if (tile.rows == kBlock && tile.columns % kRow == 0) {
      const int64_t to_next =
          offset_of(loss, tile_at(loss, index + 1), 0, 0) - offset_of(loss, tile, 0, 0);
      run_whole<with_gradient, Prediction, Target>(loss, tile, weights, scales, to_next, partials);
    } else {
      run_padded<with_gradient, Prediction, Target>(loss, tile, weights, scales, partials);
    }
    partials[0] *= timestep_weight;
  }
}

int64_t tiles(const FlowMatchingLoss& loss) {
  return loss.batch * Grid(loss).tiles_per_image();
}

template <class Prediction, class Target>
void run_typed(const FlowMatchingLoss& loss, int64_t begin, int64_t end) {
  loss.gradient ? run_as<true, Prediction, Target>(loss, begin, end)
                : run_as<false, Prediction, Target>(loss, begin, end);
}

void run(const FlowMatchingLoss& loss, int64_t begin, int64_t end) {
  const bool target_is_float = loss.target_element == Element::float32;
  if (loss.prediction_element == Element::float32) {
    target_is_float ? run_typed<float, float>(loss, begin, end)
                    : run_typed<float, BFloat16>(loss, begin, end);
  } else {
    target_is_float ? run_typed<BFloat16, float>(loss, begin, end)
                    : run_typed<BFloat16, BFloat16>(loss, begin, end);
  }
}

}  // namespace

const FlowMatchingLossKernel flow_matching_loss = {tiles, run};

}  // namespace deco::DECO_NAMESPACE
