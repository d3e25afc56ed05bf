#include "packed_linear.h"

#include "vector.h"

namespace deco::DECO_NAMESPACE {
namespace {

static_assert(kTileColumns % (2 * kLanes) == 0);

void split(const float* x, void* high, void* low, int64_t count) {
  auto* highs = static_cast<BFloat16*>(high);
  auto* lows = static_cast<BFloat16*>(low);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector value = load_some(x + i, count - i);
    BFloat16 rounded[kLanes];
    store(rounded, value);
    store_some(highs + i, value, count - i);
    store_some(lows + i, value - load(rounded), count - i);
  }
}

template <class T>
void finish_as(const PackedLinearTile& tile) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    const float* sums = tile.sums + row * kTileColumns;
    T* results = static_cast<T*>(tile.results) + row * tile.stride;
    for (int64_t i = 0; i < tile.columns; i += kLanes) {
      Vector value = load(sums + i);
      if (tile.activation == Activation::swiglu) {
        value = value * sigmoid(value) * load(sums + kTileColumns / 2 + i);
      } else if (tile.bias != nullptr) {
        value += load_some(tile.bias + i, tile.columns - i);
      }
      store_some(results + i, value, tile.columns - i);
    }
  }
}

void finish(const PackedLinearTile& tile) {
  if (tile.element == Element::float32) {
    finish_as<float>(tile);
  } else {
    finish_as<BFloat16>(tile);
  }
}

}  // namespace

extern const PackedLinearKernel packed_linear = {split, finish};

}  // namespace deco::DECO_NAMESPACE
