// The kernels of pixel_decoder.h for one instruction set, DECO_NAMESPACE.
//
// Lanes are tokens: a tile is kTile tokens at one pixel position, an array of it has a row of
// kTile numbers for each channel. So a norm over the channels needs no sum across lanes, and
// every product is `product` below: broadcast numbers on its left, rows on its right.
#include "pixel_decoder.h"

#include "vector.h"

namespace deco::DECO_NAMESPACE {
namespace {

constexpr int kTile = 32;
constexpr int kTileVectors = kTile / kLanes;
constexpr int kAlignment = 64;
constexpr float kNormEps = 1e-6f;

// Chunks of a problem: enough to share among the threads, few enough that their partial
// gradients stay small.
constexpr int64_t kChunks = 64;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Operands of the small products -----------------------------------------------------------

// Rows of float32; an array serves on either side of a product.
struct Float32Operand {
  using Scalar = float;
  static constexpr int kPack = 1;  // consecutive k in one 32-bit element

  template <int rows>
  struct Tile {
    alignas(kAlignment) float data[rows * kTile];

    DECO_INLINE const Scalar* left() const { return data; }
    DECO_INLINE const Scalar* right() const { return data; }
    // Sets vector v of the rows 2·pair and 2·pair + 1.
    DECO_INLINE void put(int pair, int v, Vector even, Vector odd) {
      store(data + 2 * pair * kTile + v * kLanes, even);
      store(data + (2 * pair + 1) * kTile + v * kLanes, odd);
    }
  };

  DECO_INLINE static void write(Scalar* to, float value) { *to = value; }
  DECO_INLINE static Vector right_vector(const Scalar* rows, int columns, int k, int v) {
    return load(rows + k * columns + v * kLanes);
  }
  DECO_INLINE static void accumulate(Vector& sum, const Scalar* left, Vector right) {
    sum += *left * right;
  }
  DECO_INLINE static Vector sigmoid(Vector x) { return DECO_NAMESPACE::sigmoid(x); }
};

#ifdef __AVX512BF16__
// bfloat16 with two consecutive k in each 32-bit element, as the dot product instruction takes
// them: pairs along a row on the left, pairs of rows on the right.
struct BFloat16Operand {
  using Scalar = BFloat16;
  static constexpr int kPack = 2;

  template <int rows>
  struct Tile {
    alignas(kAlignment) BFloat16 left_data[rows * kTile];
    alignas(kAlignment) BFloat16 right_data[rows * kTile];

    DECO_INLINE const Scalar* left() const { return left_data; }
    DECO_INLINE const Scalar* right() const { return right_data; }
    DECO_INLINE void put(int pair, int v, Vector even, Vector odd) {
      const auto both = bits_of<__m512i>(
          _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even)));
      const auto* halves = reinterpret_cast<const char*>(&both);
      __builtin_memcpy(left_data + 2 * pair * kTile + v * kLanes, halves, 32);
      __builtin_memcpy(left_data + (2 * pair + 1) * kTile + v * kLanes, halves + 32, 32);
      // Lane i of the result holds lane i of both rows.
      alignas(kAlignment) static constexpr uint16_t kInterleave[32] = {
          0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i pairs =
          _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both);
      __builtin_memcpy(right_data + 2 * (pair * kTile + v * kLanes), &pairs, 64);
    }
  };

  DECO_INLINE static void write(Scalar* to, float value) {
    BFloat16 rounded[kLanes];
    store(rounded, broadcast(value));
    *to = rounded[0];
  }
  DECO_INLINE static Vector right_vector(const Scalar* rows, int columns, int k, int v) {
    return load_bits(rows + 2 * (k * columns + v * kLanes));
  }
  DECO_INLINE static void accumulate(Vector& sum, const Scalar* left, Vector right) {
    sum = add_products_of_pairs(sum, left, right);
  }
  DECO_INLINE static Vector sigmoid(Vector x) { return rough_sigmoid(x); }
};
#else
// Without dot products, bfloat16 is only how y is stored.
using BFloat16Operand = Float32Operand;
#endif

#ifdef __AMX_BF16__
// The matrix unit's registers while this lives: eight of 16 rows of 64 bytes.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(kAlignment) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    _tile_loadconfig(&layout);
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() { _tile_release(); }
};

// `product` by blocks of 32 × 32, which are four registers.
template <int rows, int depth, int columns, class Epilogue>
DECO_INLINE void matrix_unit_product(const BFloat16* left, const BFloat16* right,
                                     Epilogue&& epilogue) {
  alignas(kAlignment) float sums[32 * 32];
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  for (int row = 0; row < rows; row += 32) {
    for (int column = 0; column < columns; column += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int k = 0; k < depth; k += 32) {
        const BFloat16* a = left + row * depth + k;
        const BFloat16* b = right + k * columns + 2 * column;
        _tile_loadd(4, a, 2 * depth);
        _tile_loadd(5, a + 16 * depth, 2 * depth);
        _tile_loadd(6, b, 4 * columns);
        _tile_loadd(7, b + 32, 4 * columns);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, 128);
      _tile_stored(1, sums + 16, 128);
      _tile_stored(2, sums + 16 * 32, 128);
      _tile_stored(3, sums + 16 * 32 + 16, 128);
      for (int i = 0; i < 32; ++i) {
        epilogue(row + i, column / kLanes, load(sums + 32 * i));
        epilogue(row + i, column / kLanes + 1, load(sums + 32 * i + kLanes));
      }
    }
  }
}
#else
struct MatrixUnit {
  MatrixUnit() {}  // so that its variable counts as used
};
#endif

// out[row] = Σ_k left[row][k] · right[k], handed vector by vector to epilogue(row, v, value).
template <class Operand, int rows, int depth, int columns, class Epilogue>
DECO_INLINE void product(const typename Operand::Scalar* left,
                         const typename Operand::Scalar* right, Epilogue&& epilogue) {
#ifdef __AMX_BF16__
  if constexpr (Operand::kPack == 2 && rows % 32 == 0 && depth % 32 == 0 && columns % 32 == 0) {
    return matrix_unit_product<rows, depth, columns>(left, right, epilogue);
  }
#endif
  constexpr int vectors = columns / kLanes;
  constexpr int wide = vectors % 2 == 0 ? 2 : 1;
  // As many sums as the registers hold beside the operands: 32 with AVX-512, else 16.
  constexpr int high = (kLanes == 16 ? 16 : 8) / wide;
  static_assert(rows % high == 0 && vectors % wide == 0);
  for (int row = 0; row < rows; row += high) {
    for (int v = 0; v < vectors; v += wide) {
      Vector sums[high][wide] = {};
#pragma GCC unroll 4
      for (int k = 0; k < depth / Operand::kPack; ++k) {
        Vector factors[wide];
#pragma GCC unroll 2
        for (int j = 0; j < wide; ++j) {
          factors[j] = Operand::right_vector(right, columns, k, v + j);
        }
#pragma GCC unroll 16
        for (int i = 0; i < high; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < wide; ++j) {
            Operand::accumulate(sums[i][j], left + (row + i) * depth + k * Operand::kPack,
                                factors[j]);
          }
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < high; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < wide; ++j) {
          epilogue(row + i, v + j, sums[i][j]);
        }
      }
    }
  }
}

// ---- The tokens of a tile ---------------------------------------------------------------------

// Where the pixels of a tile lie in x. The lanes after `count` hold zeros and write nothing.
struct TileTokens {
  int64_t first;
  int count;
  int64_t offset[kTile];  // of the patch's first pixel, in the first colour plane

  TileTokens(const PixelDecoderShape& shape, int64_t tokens, int64_t tile) {
    const int64_t p = shape.patch_size;
    const int64_t across = shape.width / p;
    const int64_t down = shape.height / p;
    first = tile * kTile;
    count = static_cast<int>(smaller(kTile, tokens - first));
    int64_t column = first % across;
    int64_t row = first / across % down;
    int64_t image = first / across / down;
    for (int t = 0; t < count; ++t) {
      offset[t] = (image * 3 * shape.height + row * p) * shape.width + column * p;
      if (++column == across) {
        column = 0;
        if (++row == down) {
          row = 0;
          ++image;
        }
      }
    }
  }

  DECO_INLINE void gather(const float* pixel, int64_t plane, float (&to)[3 * kTile]) const {
    __builtin_memset(to, 0, sizeof to);
    for (int c = 0; c < 3; ++c) {
      for (int t = 0; t < count; ++t) {
        to[c * kTile + t] = pixel[c * plane + offset[t]];
      }
    }
  }

  DECO_INLINE void scatter(const float (&from)[3 * kTile], int64_t plane, float* pixel) const {
    for (int c = 0; c < 3; ++c) {
      for (int t = 0; t < count; ++t) {
        pixel[c * plane + offset[t]] = from[c * kTile + t];
      }
    }
  }
};

struct Problem {
  int64_t tokens, pixels, tiles, segments, groups, plane;

  explicit Problem(const PixelDecoderShape& shape) {
    const int64_t p = shape.patch_size;
    plane = shape.height * shape.width;
    pixels = shape.pixels;
    tokens = shape.batch * (plane / (p * p));
    tiles = ceil_divide(tokens, kTile);
    // Pixels first: the gradients of the table and the bias then need no partial sums.
    segments = smaller(tiles > 0 ? tiles : 1, ceil_divide(kChunks, pixels));
    groups = smaller(pixels, ceil_divide(kChunks, segments));
  }
};

// The pixels, counted from the call's first, and the tiles of one chunk.
struct Chunk {
  int64_t segment, pixel_begin, pixel_end, tile_begin, tile_end;

  Chunk(const Problem& problem, int64_t chunk) {
    const int64_t group = chunk / problem.segments;
    segment = chunk % problem.segments;
    pixel_begin = problem.pixels * group / problem.groups;
    pixel_end = problem.pixels * (group + 1) / problem.groups;
    tile_begin = problem.tiles * segment / problem.segments;
    tile_end = problem.tiles * (segment + 1) / problem.segments;
  }
};

// ---- The decoder ------------------------------------------------------------------------------

template <int rows>
struct Rows {
  alignas(kAlignment) float data[rows * kTile];

  DECO_INLINE Vector get(int row, int v) const { return load(data + row * kTile + v * kLanes); }
  DECO_INLINE void set(int row, int v, Vector value) {
    store(data + row * kTile + v * kLanes, value);
  }
};

// Sums over all tokens, kept apart by lane until the end of the chunk.
template <int rows>
struct LaneSums {
  alignas(kAlignment) float data[rows * kLanes];

  DECO_INLINE void clear() { __builtin_memset(data, 0, sizeof data); }
  DECO_INLINE void add(int row, Vector value) {
    store(data + row * kLanes, load(data + row * kLanes) + value);
  }
  float* write(float* to) const {
    for (int row = 0; row < rows; ++row) {
      *to++ = sum_of_lanes(load(data + row * kLanes));
    }
    return to;
  }
};

template <class Element, class Operand, int C>
class Decoder {
  using Scalar = typename Operand::Scalar;
  template <int rows>
  using Tile = typename Operand::template Tile<rows>;

  // The matrices of a block as left operands, for the forward pass and transposed for the
  // backward pass.
  struct PackedBlock {
    alignas(kAlignment) Scalar modulation[3 * C * C];
    alignas(kAlignment) Scalar fc1[C * C];
    alignas(kAlignment) Scalar fc2[C * C];
    alignas(kAlignment) Scalar modulation_transposed[C * 3 * C];
    alignas(kAlignment) Scalar fc1_transposed[C * C];
    alignas(kAlignment) Scalar fc2_transposed[C * C];
  };

  // What a block's backward pass needs of its forward pass.
  struct BlockState {
    Rows<C> normalized;
    Vector deviation[kTileVectors];  // 1 / the standard deviation
    Rows<3 * C> modulation;
    Tile<C> fc1_in;
    Rows<C> fc1_out;
    Tile<C> fc2_in;
    Rows<C> fc2_out;
  };

  struct Buffers {
    alignas(kAlignment) float x[3 * kTile];
    alignas(kAlignment) float velocity[3 * kTile];
    Rows<C> y;  // with its bias
    Tile<C> condition;
    Rows<C> h;
    Rows<C> normalized;
    Vector deviation[kTileVectors];
  };

  struct BlockGradients {
    LaneSums<C> norm_weight, norm_bias, fc1_bias, fc2_bias;
    LaneSums<3 * C> modulation_bias;
    alignas(kAlignment) float modulation[3 * C * C];
    alignas(kAlignment) float fc1[C * C];
    alignas(kAlignment) float fc2[C * C];
  };

  struct BackwardBuffers {
    Rows<C> grad_h;
    Rows<C> grad_condition;
    Rows<C> scratch;
    Tile<3 * C> grad_modulation;
    Tile<C> grad_hidden;
    alignas(kAlignment) Scalar condition_transposed[kTile * C];
    alignas(kAlignment) Scalar transposed[kTile * C];
    LaneSums<3 * C> rgb_weight;
    LaneSums<3 * C> output_weight;
    LaneSums<3> output_bias;
    LaneSums<C> table;
    LaneSums<C> upsample_bias;
  };

  template <class T>
  struct Owned {
    T* const data;
    explicit Owned(int64_t count = 1) : data(new T[static_cast<std::size_t>(count)]) {}
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() { delete[] data; }
  };

  // ---- forward ----

  // h and the condition, from x and y.
  DECO_INLINE static void begin(const PixelDecoderWeights& w, int64_t pixel, const Element* y,
                                int64_t tokens, int count, Buffers& b) {
    const float* bias = w.upsample_bias + pixel * C;
    const float* table = w.table + pixel * C;
    alignas(kAlignment) Element padded[2 * kTile];
    for (int pair = 0; pair < C / 2; ++pair) {
      const Element* rows[2] = {y + 2 * pair * tokens, y + (2 * pair + 1) * tokens};
      if (count < kTile) {
        __builtin_memset(padded, 0, sizeof padded);
        for (int r = 0; r < 2; ++r) {
          __builtin_memcpy(padded + r * kTile, rows[r], count * sizeof(Element));
          rows[r] = padded + r * kTile;
        }
      }
      for (int v = 0; v < kTileVectors; ++v) {
        Vector condition[2];
        for (int r = 0; r < 2; ++r) {
          const int row = 2 * pair + r;
          const Vector value = load(rows[r] + v * kLanes) + bias[row];
          b.y.set(row, v, value);
          condition[r] = value * Operand::sigmoid(value);
          Vector h = broadcast(table[row]);
          for (int c = 0; c < 3; ++c) {
            h += w.rgb_weight[row * 3 + c] * load(b.x + c * kTile + v * kLanes);
          }
          b.h.set(row, v, h);
        }
        b.condition.put(pair, v, condition[0], condition[1]);
      }
    }
  }

  DECO_INLINE static void normalize(const Rows<C>& h, Rows<C>& normalized,
                                    Vector (&deviation)[kTileVectors]) {
    for (int v = 0; v < kTileVectors; ++v) {
      Vector sum = {};
      for (int row = 0; row < C; ++row) {
        sum += h.get(row, v);
      }
      const Vector mean = sum * (1.0f / C);
      Vector squares = {};
      for (int row = 0; row < C; ++row) {
        const Vector centred = h.get(row, v) - mean;
        squares += centred * centred;
      }
      const Vector inverse = reciprocal_sqrt(squares * (1.0f / C) + kNormEps);
      for (int row = 0; row < C; ++row) {
        normalized.set(row, v, (h.get(row, v) - mean) * inverse);
      }
      deviation[v] = inverse;
    }
  }

  static void block_forward(const PixelDecoderBlockWeights& w, const PackedBlock& packed,
                            const Tile<C>& condition, Rows<C>& h, BlockState& s) {
    normalize(h, s.normalized, s.deviation);
    product<Operand, 3 * C, C, kTile>(
        packed.modulation, condition.right(), [&](int row, int v, Vector value) DECO_LAMBDA {
          s.modulation.set(row, v, value + w.modulation_bias[row]);
        });
    for (int pair = 0; pair < C / 2; ++pair) {
      for (int v = 0; v < kTileVectors; ++v) {
        Vector z[2];
        for (int r = 0; r < 2; ++r) {
          const int row = 2 * pair + r;
          const Vector n = s.normalized.get(row, v) * w.norm_weight[row] + w.norm_bias[row];
          z[r] = n * (1.0f + s.modulation.get(C + row, v)) + s.modulation.get(row, v);
        }
        s.fc1_in.put(pair, v, z[0], z[1]);
      }
    }
    product<Operand, C, C, kTile>(packed.fc1, s.fc1_in.right(),
                                  [&](int row, int v, Vector value) DECO_LAMBDA {
                                    s.fc1_out.set(row, v, value + w.fc1_bias[row]);
                                  });
    for (int pair = 0; pair < C / 2; ++pair) {
      for (int v = 0; v < kTileVectors; ++v) {
        const Vector even = s.fc1_out.get(2 * pair, v);
        const Vector odd = s.fc1_out.get(2 * pair + 1, v);
        s.fc2_in.put(pair, v, even * Operand::sigmoid(even), odd * Operand::sigmoid(odd));
      }
    }
    product<Operand, C, C, kTile>(
        packed.fc2, s.fc2_in.right(), [&](int row, int v, Vector value) DECO_LAMBDA {
          value += w.fc2_bias[row];
          s.fc2_out.set(row, v, value);
          h.set(row, v, h.get(row, v) + s.modulation.get(2 * C + row, v) * value);
        });
  }

 public:
  static int64_t packed_bytes(const PixelDecoderShape& shape) {
    return shape.blocks * static_cast<int64_t>(sizeof(PackedBlock));
  }

  static void pack(const PixelDecoderShape& shape, const PixelDecoderWeights& w, void* to) {
    const auto matrix = [](const float* from, int rows, Scalar* plain, Scalar* transposed) {
      for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < C; ++column) {
          Operand::write(plain + row * C + column, from[row * C + column]);
          Operand::write(transposed + column * rows + row, from[row * C + column]);
        }
      }
    };
    auto* packed = static_cast<PackedBlock*>(to);
    for (int i = 0; i < shape.blocks; ++i) {
      matrix(w.blocks[i].modulation_weight, 3 * C, packed[i].modulation,
             packed[i].modulation_transposed);
      matrix(w.blocks[i].fc1_weight, C, packed[i].fc1, packed[i].fc1_transposed);
      matrix(w.blocks[i].fc2_weight, C, packed[i].fc2, packed[i].fc2_transposed);
    }
  }

  static int64_t gradient_size(const PixelDecoderShape& shape) {
    return 3 * C + shape.blocks * (5 * C * C + 7 * C) + 3 * C + 3;
  }

  static void forward(const PixelDecoderForward& args, int64_t index) {
    const PixelDecoderShape& shape = args.shape;
    const PixelDecoderWeights& w = args.weights;
    const Problem problem(shape);
    const Chunk chunk(problem, index);
    const auto* packed = static_cast<const PackedBlock*>(args.packed);
    const auto* y = static_cast<const Element*>(args.y);
    Owned<Buffers> buffers;
    Owned<BlockState> state;
    Buffers& b = *buffers.data;
    const MatrixUnit unit;

    for (int64_t pixel = chunk.pixel_begin; pixel < chunk.pixel_end; ++pixel) {
      const int64_t in_patch = shape.first_pixel + pixel;
      const int64_t place =
          in_patch / shape.patch_size * shape.width + in_patch % shape.patch_size;
      for (int64_t tile = chunk.tile_begin; tile < chunk.tile_end; ++tile) {
        const TileTokens tokens(shape, problem.tokens, tile);
        const Element* rows = y + pixel * C * problem.tokens + tokens.first;
        tokens.gather(args.x + place, problem.plane, b.x);
        begin(w, in_patch, rows, problem.tokens, tokens.count, b);
        prefetch(rows, problem.tokens, tokens);
        for (int i = 0; i < shape.blocks; ++i) {
          block_forward(w.blocks[i], packed[i], b.condition, b.h, *state.data);
        }
        normalize(b.h, b.normalized, b.deviation);
        for (int v = 0; v < kTileVectors; ++v) {
          Vector velocity[3];
          for (int c = 0; c < 3; ++c) {
            velocity[c] = broadcast(w.output_bias[c]);
          }
          for (int row = 0; row < C; ++row) {
            const Vector value = b.normalized.get(row, v);
            for (int c = 0; c < 3; ++c) {
              velocity[c] += w.output_weight[c * C + row] * value;
            }
          }
          for (int c = 0; c < 3; ++c) {
            store(b.velocity + c * kTile + v * kLanes, velocity[c]);
          }
        }
        tokens.scatter(b.velocity, problem.plane, args.velocity + place);
      }
    }
  }

 private:
  // The next tile's rows lie on as many pages, which the processor does not foresee.
  DECO_INLINE static void prefetch(const Element* rows, int64_t tokens, const TileTokens& tile) {
    if (tile.first + 2 * kTile <= tokens) {
      for (int row = 0; row < C; ++row) {
        const Element* next = rows + row * tokens + kTile;
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + kTile / 2, 0, 2);
      }
    }
  }

  // ---- backward ----

  // gradient += grad_out · inᵀ, a sum over the tile's tokens.
  template <int rows>
  DECO_INLINE static void add_weight_gradient(const Scalar* grad_out, const Scalar* in_transposed,
                                              float* gradient) {
    product<Operand, rows, kTile, C>(grad_out, in_transposed,
                                     [&](int row, int v, Vector value) DECO_LAMBDA {
                                       float* to = gradient + row * C + v * kLanes;
                                       store(to, load(to) + value);
                                     });
  }

  DECO_INLINE static void transpose_tile(const Tile<C>& tile, Scalar* to) {
    transpose<C, kTile / Operand::kPack>(tile.left(), to);
  }

  // grad_h of a norm's input from the gradient of its output in `scratch`: added to or set.
  template <bool add>
  DECO_INLINE static void normalize_backward(const Rows<C>& grad, const Rows<C>& normalized,
                                             const Vector (&deviation)[kTileVectors],
                                             Rows<C>& grad_h) {
    for (int v = 0; v < kTileVectors; ++v) {
      Vector sum = {};
      Vector projection = {};
      for (int row = 0; row < C; ++row) {
        const Vector value = grad.get(row, v);
        sum += value;
        projection += value * normalized.get(row, v);
      }
      sum *= 1.0f / C;
      projection *= 1.0f / C;
      for (int row = 0; row < C; ++row) {
        const Vector value =
            (grad.get(row, v) - sum - normalized.get(row, v) * projection) * deviation[v];
        grad_h.set(row, v, add ? grad_h.get(row, v) + value : value);
      }
    }
  }

  static void block_backward(const PixelDecoderBlockWeights& w, const PackedBlock& packed,
                             const BlockState& s, BackwardBuffers& b, BlockGradients& g) {
    for (int pair = 0; pair < C / 2; ++pair) {
      Vector gate_sum[2] = {};
      Vector out_sum[2] = {};
      for (int v = 0; v < kTileVectors; ++v) {
        Vector grad_gate[2];
        Vector grad_out[2];
        for (int r = 0; r < 2; ++r) {
          const int row = 2 * pair + r;
          const Vector grad = b.grad_h.get(row, v);
          grad_gate[r] = grad * s.fc2_out.get(row, v);
          grad_out[r] = grad * s.modulation.get(2 * C + row, v);
          gate_sum[r] += grad_gate[r];
          out_sum[r] += grad_out[r];
        }
        b.grad_modulation.put(C + pair, v, grad_gate[0], grad_gate[1]);
        b.grad_hidden.put(pair, v, grad_out[0], grad_out[1]);
      }
      for (int r = 0; r < 2; ++r) {
        g.modulation_bias.add(2 * C + 2 * pair + r, gate_sum[r]);
        g.fc2_bias.add(2 * pair + r, out_sum[r]);
      }
    }
    transpose_tile(s.fc2_in, b.transposed);
    add_weight_gradient<C>(b.grad_hidden.left(), b.transposed, g.fc2);
    product<Operand, C, C, kTile>(
        packed.fc2_transposed, b.grad_hidden.right(),
        [&](int row, int v, Vector value) DECO_LAMBDA { b.scratch.set(row, v, value); });

    for (int pair = 0; pair < C / 2; ++pair) {
      Vector bias_sum[2] = {};
      for (int v = 0; v < kTileVectors; ++v) {
        Vector grad[2];
        for (int r = 0; r < 2; ++r) {
          const int row = 2 * pair + r;
          grad[r] = b.scratch.get(row, v) * silu_derivative(s.fc1_out.get(row, v));
          bias_sum[r] += grad[r];
        }
        b.grad_hidden.put(pair, v, grad[0], grad[1]);
      }
      for (int r = 0; r < 2; ++r) {
        g.fc1_bias.add(2 * pair + r, bias_sum[r]);
      }
    }
    transpose_tile(s.fc1_in, b.transposed);
    add_weight_gradient<C>(b.grad_hidden.left(), b.transposed, g.fc1);
    product<Operand, C, C, kTile>(
        packed.fc1_transposed, b.grad_hidden.right(),
        [&](int row, int v, Vector value) DECO_LAMBDA { b.scratch.set(row, v, value); });

    for (int pair = 0; pair < C / 2; ++pair) {
      Vector shift_sum[2] = {}, scale_sum[2] = {}, weight_sum[2] = {}, norm_bias_sum[2] = {};
      for (int v = 0; v < kTileVectors; ++v) {
        Vector grad_shift[2];
        Vector grad_scale[2];
        for (int r = 0; r < 2; ++r) {
          const int row = 2 * pair + r;
          const Vector normalized = s.normalized.get(row, v);
          const Vector grad = b.scratch.get(row, v);
          const Vector grad_norm = grad * (1.0f + s.modulation.get(C + row, v));
          grad_shift[r] = grad;
          grad_scale[r] = grad * (normalized * w.norm_weight[row] + w.norm_bias[row]);
          shift_sum[r] += grad_shift[r];
          scale_sum[r] += grad_scale[r];
          weight_sum[r] += grad_norm * normalized;
          norm_bias_sum[r] += grad_norm;
          b.scratch.set(row, v, grad_norm * w.norm_weight[row]);
        }
        b.grad_modulation.put(pair, v, grad_shift[0], grad_shift[1]);
        b.grad_modulation.put(C / 2 + pair, v, grad_scale[0], grad_scale[1]);
      }
      for (int r = 0; r < 2; ++r) {
        const int row = 2 * pair + r;
        g.modulation_bias.add(row, shift_sum[r]);
        g.modulation_bias.add(C + row, scale_sum[r]);
        g.norm_weight.add(row, weight_sum[r]);
        g.norm_bias.add(row, norm_bias_sum[r]);
      }
    }
    normalize_backward<true>(b.scratch, s.normalized, s.deviation, b.grad_h);
    add_weight_gradient<3 * C>(b.grad_modulation.left(), b.condition_transposed, g.modulation);
    product<Operand, C, 3 * C, kTile>(
        packed.modulation_transposed, b.grad_modulation.right(),
        [&](int row, int v, Vector value) DECO_LAMBDA {
          b.grad_condition.set(row, v, b.grad_condition.get(row, v) + value);
        });
  }

  DECO_INLINE static Vector silu_derivative(Vector x) {
    const Vector s = Operand::sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
  }

  // The gradients of the output layer; leaves that of the normalised h in `scratch`.
  DECO_INLINE static void output_backward(const PixelDecoderWeights& w, const float* grad_velocity,
                                          const Rows<C>& normalized, BackwardBuffers& b) {
    for (int v = 0; v < kTileVectors; ++v) {
      Vector grad[3];
      for (int c = 0; c < 3; ++c) {
        grad[c] = load(grad_velocity + c * kTile + v * kLanes);
        b.output_bias.add(c, grad[c]);
      }
      for (int row = 0; row < C; ++row) {
        const Vector value = normalized.get(row, v);
        Vector sum = {};
        for (int c = 0; c < 3; ++c) {
          b.output_weight.add(c * C + row, grad[c] * value);
          sum += w.output_weight[c * C + row] * grad[c];
        }
        b.scratch.set(row, v, sum);
      }
    }
  }

  // The gradients of the input: rgb_weight, the table, and x into `grad_x`.
  DECO_INLINE static void input_backward(const PixelDecoderWeights& w, const float* x,
                                         BackwardBuffers& b, float* grad_x) {
    for (int v = 0; v < kTileVectors; ++v) {
      Vector grad_pixel[3] = {};
      for (int row = 0; row < C; ++row) {
        const Vector grad = b.grad_h.get(row, v);
        b.table.add(row, grad);
        for (int c = 0; c < 3; ++c) {
          b.rgb_weight.add(row * 3 + c, grad * load(x + c * kTile + v * kLanes));
          grad_pixel[c] += w.rgb_weight[row * 3 + c] * grad;
        }
      }
      for (int c = 0; c < 3; ++c) {
        store(grad_x + c * kTile + v * kLanes, grad_pixel[c]);
      }
    }
  }

  DECO_INLINE static void condition_backward(const Rows<C>& y, BackwardBuffers& b, Element* grad_y,
                                             int64_t tokens, int count) {
    alignas(kAlignment) Element padded[kTile];
    for (int row = 0; row < C; ++row) {
      Element* to = count < kTile ? padded : grad_y + row * tokens;
      for (int v = 0; v < kTileVectors; ++v) {
        const Vector grad = b.grad_condition.get(row, v) * silu_derivative(y.get(row, v));
        b.upsample_bias.add(row, grad);
        store(to + v * kLanes, grad);
      }
      if (count < kTile) {
        __builtin_memcpy(grad_y + row * tokens, padded, count * sizeof(Element));
      }
    }
  }

  static void write_gradients(int blocks, const BackwardBuffers& b, const BlockGradients* gradients,
                              float* to) {
    const auto copy = [](const float* from, int count, float* destination) {
      __builtin_memcpy(destination, from, count * sizeof(float));
      return destination + count;
    };
    to = b.rgb_weight.write(to);
    for (int i = 0; i < blocks; ++i) {
      const BlockGradients& g = gradients[i];
      to = g.norm_weight.write(to);
      to = g.norm_bias.write(to);
      to = copy(g.modulation, 3 * C * C, to);
      to = g.modulation_bias.write(to);
      to = copy(g.fc1, C * C, to);
      to = g.fc1_bias.write(to);
      to = copy(g.fc2, C * C, to);
      to = g.fc2_bias.write(to);
    }
    to = b.output_weight.write(to);
    b.output_bias.write(to);
  }

 public:
  static void backward(const PixelDecoderBackward& args, int64_t index) {
    const PixelDecoderShape& shape = args.shape;
    const PixelDecoderWeights& w = args.weights;
    const Problem problem(shape);
    const Chunk chunk(problem, index);
    const auto* packed = static_cast<const PackedBlock*>(args.packed);
    const auto* y = static_cast<const Element*>(args.y);
    auto* grad_y = static_cast<Element*>(args.grad_y);
    Owned<Buffers> forward_buffers;
    Owned<BackwardBuffers> backward_buffers;
    Owned<BlockState> states(shape.blocks);
    Owned<BlockGradients> gradients(shape.blocks);
    Buffers& f = *forward_buffers.data;
    BackwardBuffers& b = *backward_buffers.data;
    __builtin_memset(gradients.data, 0, shape.blocks * sizeof(BlockGradients));
    b.rgb_weight.clear();
    b.output_weight.clear();
    b.output_bias.clear();
    const MatrixUnit unit;

    for (int64_t pixel = chunk.pixel_begin; pixel < chunk.pixel_end; ++pixel) {
      const int64_t in_patch = shape.first_pixel + pixel;
      const int64_t place =
          in_patch / shape.patch_size * shape.width + in_patch % shape.patch_size;
      b.table.clear();
      b.upsample_bias.clear();
      for (int64_t tile = chunk.tile_begin; tile < chunk.tile_end; ++tile) {
        const TileTokens tokens(shape, problem.tokens, tile);
        const int64_t first = pixel * C * problem.tokens + tokens.first;
        tokens.gather(args.x + place, problem.plane, f.x);
        begin(w, in_patch, y + first, problem.tokens, tokens.count, f);
        prefetch(y + first, problem.tokens, tokens);
        for (int i = 0; i < shape.blocks; ++i) {
          block_forward(w.blocks[i], packed[i], f.condition, f.h, states.data[i]);
        }
        normalize(f.h, f.normalized, f.deviation);

        // The lanes without a token have no gradient here, and so nowhere.
        tokens.gather(args.grad_velocity + place, problem.plane, f.velocity);
        output_backward(w, f.velocity, f.normalized, b);
        normalize_backward<false>(b.scratch, f.normalized, f.deviation, b.grad_h);
        transpose_tile(f.condition, b.condition_transposed);
        __builtin_memset(&b.grad_condition, 0, sizeof b.grad_condition);
        for (int i = shape.blocks - 1; i >= 0; --i) {
          block_backward(w.blocks[i], packed[i], states.data[i], b, gradients.data[i]);
        }
        input_backward(w, f.x, b, f.velocity);
        if (args.grad_x != nullptr) {
          tokens.scatter(f.velocity, problem.plane, args.grad_x + place);
        }
        condition_backward(f.y, b, grad_y + first, problem.tokens, tokens.count);
      }
      const int64_t row = (chunk.segment * problem.pixels + pixel) * C;
      b.table.write(args.grad_table + row);
      b.upsample_bias.write(args.grad_upsample_bias + row);
    }
    write_gradients(shape.blocks, b, gradients.data,
                    args.partials + index * gradient_size(shape));
  }
};

// ---- The table --------------------------------------------------------------------------------

// Calls f with the Decoder of the shape.
template <class F>
auto with_decoder(const PixelDecoderShape& shape, F&& f) {
  const auto with_channels = [&](auto element, auto operand) {
    using E = decltype(element);
    using O = decltype(operand);
    switch (shape.channels) {
      case 16:
        return f(Decoder<E, O, 16>());
      case 32:
        return f(Decoder<E, O, 32>());
      default:
        return f(Decoder<E, O, 64>());
    }
  };
  return shape.element == Element::bfloat16 ? with_channels(BFloat16(), BFloat16Operand())
                                            : with_channels(float(), Float32Operand());
}

int64_t packed_bytes(const PixelDecoderShape& shape) {
  return with_decoder(shape, [&](auto decoder) { return decoder.packed_bytes(shape); });
}

void pack(const PixelDecoderShape& shape, const PixelDecoderWeights& weights, void* packed) {
  with_decoder(shape, [&](auto decoder) { decoder.pack(shape, weights, packed); });
}

int64_t chunks(const PixelDecoderShape& shape) {
  const Problem problem(shape);
  return problem.groups * problem.segments;
}

int64_t segments(const PixelDecoderShape& shape) { return Problem(shape).segments; }

int64_t gradient_size(const PixelDecoderShape& shape) {
  return with_decoder(shape, [&](auto decoder) { return decoder.gradient_size(shape); });
}

void forward(const PixelDecoderForward& args, int64_t chunk) {
  with_decoder(args.shape, [&](auto decoder) { decoder.forward(args, chunk); });
}

void backward(const PixelDecoderBackward& args, int64_t chunk) {
  with_decoder(args.shape, [&](auto decoder) { decoder.backward(args, chunk); });
}

void reduce(const PixelDecoderBackward& args, int64_t begin, int64_t end) {
  const int64_t size = gradient_size(args.shape);
  const int64_t rows = chunks(args.shape);
  constexpr int64_t kBlock = 512;
  double sums[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = smaller(kBlock, end - first);
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = 0;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = args.partials + row * size + first;
      for (int64_t i = 0; i < count; ++i) {
        sums[i] += from[i];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      args.gradients[first + i] = static_cast<float>(sums[i]);
    }
  }
}

}  // namespace

const PixelDecoderKernels pixel_decoder = {
    .packed_bytes = packed_bytes,
    .pack = pack,
    .chunks = chunks,
    .segments = segments,
    .gradient_size = gradient_size,
    .forward = forward,
    .backward = backward,
    .reduce = reduce,
};

}  // namespace deco::DECO_NAMESPACE
