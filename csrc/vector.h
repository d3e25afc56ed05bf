// Vectors of the instruction set that the including file is compiled for, by the vector
// extensions of GCC and Clang. Everything is in the namespace of that instruction set and always
// inlined: see pixel_decoder.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define DECO_INLINE inline __attribute__((always_inline))
#define DECO_LAMBDA __attribute__((always_inline))

namespace deco::DECO_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UIntVector __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
DECO_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

DECO_INLINE Vector load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

DECO_INLINE Vector load_bits(const void* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

DECO_INLINE void store(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof v); }

// Adding zero would lose the sign of -0; the lanes of an initialiser list do not.
template <int... lane>
DECO_INLINE Vector broadcast(float value, std::integer_sequence<int, lane...>) {
  return Vector{((void)lane, value)...};
}

DECO_INLINE Vector broadcast(float value) {
  return broadcast(value, std::make_integer_sequence<int, kLanes>());
}

struct BFloat16 {
  uint16_t bits;
};

DECO_INLINE Vector load(const BFloat16* from) {
  HalfVector half;
  __builtin_memcpy(&half, from, sizeof half);
  return bits_of<Vector>(__builtin_convertvector(half, UIntVector) << 16);
}

// Rounds to the nearest, ties to even; a NaN stays one.
DECO_INLINE void store(BFloat16* to, Vector v) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  const UIntVector bits = bits_of<UIntVector>(v);
  const UIntVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UIntVector quiet = (bits >> 16) | 0x40;
  const HalfVector half = __builtin_convertvector(v == v ? rounded : quiet, HalfVector);
#endif
  __builtin_memcpy(to, &half, sizeof half);
}

// The first `count` elements, and zeros after them where these do not fill a vector.
template <class T>
DECO_INLINE Vector load_some(const T* from, int64_t count) {
  if (count >= kLanes) {
    return load(from);
  }
  T some[kLanes] = {};
  if (count > 0) {
    __builtin_memcpy(some, from, sizeof(T) * count);
  }
  return load(some);
}

template <class T>
DECO_INLINE void store_some(T* to, Vector v, int64_t count) {
  if (count >= kLanes) {
    store(to, v);
    return;
  }
  T some[kLanes];
  store(some, v);
  __builtin_memcpy(to, some, sizeof(T) * count);
}

#ifdef __AVX512BF16__
// sum + even · even' + odd · odd', of a pair of bfloat16 with the pairs in the lanes of `right`.
DECO_INLINE Vector add_products_of_pairs(Vector sum, const void* left, Vector right) {
  int32_t pair;
  __builtin_memcpy(&pair, left, sizeof pair);
  return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                   bits_of<__m512bh>(_mm512_set1_epi32(pair)),
                                                   bits_of<__m512bh>(right)));
}
#endif

constexpr float kRoundingShift = 12582912.0f;  // 1.5 · 2²³: adding it leaves no bits for a fraction

// e^x for x in [-87.3, 88.3], clamped to it, within 2 units in the last place.
DECO_INLINE Vector exp(Vector x) {
  x = x < -87.3f ? broadcast(-87.3f) : x;
  x = x > 88.3f ? broadcast(88.3f) : x;
  const Vector shifted = x * 1.44269504f + kRoundingShift;
  const Vector n = shifted - kRoundingShift;
  // ln 2 in two parts, the first with few bits, so that n times it is exact.
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVector power = (bits_of<IntVector>(shifted) << 23) + 0x3f800000;
  return p * bits_of<Vector>(power);
}

DECO_INLINE Vector sigmoid(Vector x) {
  const Vector result = 1.0f / (1.0f + exp(-x));
  // Where `exp` is clamped: times x it must not grow again.
  return x < -88.0f ? broadcast(0.0f) : result;
}

#ifdef __AVX512BF16__
// `sigmoid` within 2⁻¹³ of itself, in half the time: for what is rounded to bfloat16 next.
DECO_INLINE Vector rough_sigmoid(Vector x) {
  // e^-x = 2^power; beyond these limits 1 + 2^power is 1, or more than its reciprocal can be.
  Vector power = x * -1.44269504f;
  power = power > 125.0f ? broadcast(125.0f) : power;
  power = power < -125.0f ? broadcast(-125.0f) : power;
  const Vector shifted = power + kRoundingShift;
  const Vector f = power - (shifted - kRoundingShift);
  // 2^f for f in [-1/2, 1/2], by the first terms of its series.
  Vector p = broadcast(9.6181291e-3f);
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const auto exponential = bits_of<Vector>(bits_of<IntVector>(p) +
                                           (bits_of<IntVector>(shifted) << 23));
  // With a mask, for GCC 12 warns of what the one without is made of.
  const auto result = reinterpret_cast<Vector>(
      _mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(1.0f + exponential)));
  return x < -86.0f ? broadcast(0.0f) : result;
}
#endif

// 1/√x for normal x > 0: a guess from the exponent and three steps of Newton's method.
DECO_INLINE Vector reciprocal_sqrt(Vector x) {
  Vector r = bits_of<Vector>(0x5f3759df - (bits_of<IntVector>(x) >> 1));
  for (int step = 0; step < 3; ++step) {
    r = r * (1.5f - 0.5f * x * r * r);
  }
  return r;
}

DECO_INLINE float sum_of_lanes(Vector v) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += v[lane];
  }
  return sum;
}

template <int... lane>
DECO_INLINE UIntVector shuffle(UIntVector a, UIntVector b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, IntVector{lane...});
#endif
}

// The lanes that a step of the transposition takes from its two rows.
template <int distance, bool second, int... lane>
DECO_INLINE constexpr auto exchange(std::integer_sequence<int, lane...>) {
  return std::integer_sequence<int, (second ? ((lane & distance) ? lane + kLanes : lane + distance)
                                            : ((lane & distance) ? lane - distance + kLanes
                                                                 : lane))...>();
}

template <int distance>
DECO_INLINE void transpose_step(UIntVector (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & distance) == 0) {
      const UIntVector a = rows[i];
      const UIntVector b = rows[i + distance];
      rows[i] = shuffle(a, b, exchange<distance, false>(lanes));
      rows[i + distance] = shuffle(a, b, exchange<distance, true>(lanes));
    }
  }
  if constexpr (2 * distance < kLanes) {
    transpose_step<2 * distance>(rows);
  }
}

// Transposes a matrix of 32-bit elements, (rows, columns) to (columns, rows).
template <int rows, int columns>
DECO_INLINE void transpose(const void* from, void* to) {
  const auto* source = static_cast<const uint32_t*>(from);
  auto* destination = static_cast<uint32_t*>(to);
  for (int row = 0; row < rows; row += kLanes) {
    for (int column = 0; column < columns; column += kLanes) {
      UIntVector block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_memcpy(&block[i], source + (row + i) * columns + column, sizeof block[i]);
      }
      transpose_step<1>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_memcpy(destination + (column + i) * rows + row, &block[i], sizeof block[i]);
      }
    }
  }
}

}  // namespace deco::DECO_NAMESPACE
