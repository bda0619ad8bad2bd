// The ring buffer: the last rows of the input that a step down a band needs, packed into channel vectors, with the zero
// padding that the taps reach.
//
// Terms: docs/glossary.md.
#pragma once
#include "../pixels.h"

namespace convmixer_fast::cpu {
namespace {

// What the rows of a ring buffer hold: `used` columns from the map's column `origin` on. Beside the map, and from the
// last one on up to `pitch`, there are zeros.
struct RingColumns {
  int64_t origin;
  int64_t used;
  int64_t pitch;
};

// Packs rows [begin, end) of an image's channels into the rows row_of(channel vector, row); `change` as in pack_pixels.
template <class S, class RowOf, class Change, class V = Vec<typename S::Real>>
CMF_INLINE void pack_ring(const S* x, const Strides& stride, int64_t width, int64_t channels, int64_t begin,
                          int64_t end, RingColumns columns, RowOf row_of, Change change) {
  const int64_t first = max(0, columns.origin);
  const int64_t last = min(width, columns.origin + columns.used);
  const bool joined = last - first == width && stride.h == width * stride.w;
  for (int64_t v = 0; v * kLanes<typename S::Real> < channels; ++v) {
    for (int64_t row = begin; row < end; ++row) {
      V* to = row_of(v, row);
      for (int64_t i = 0; i < first - columns.origin; ++i) to[i] = V{};
      for (int64_t i = last - columns.origin; i < columns.pitch; ++i) to[i] = V{};
    }
  }
  pack_pixels<S>(
      x + begin * stride.h + first * stride.w, stride, channels, end - begin, last - first, joined,
      [&](int64_t v, int64_t row) { return row_of(v, begin + row) + first - columns.origin; }, change);
}

// A position in a ring buffer, which moves from row to row.
template <class V>
struct RingRows {
  const V* row;
  const V* begin;
  const V* end;
  int64_t pitch;

  CMF_INLINE void next() {
    row += pitch;
    if (row >= end) row = begin;
  }
};

}  // namespace
}  // namespace convmixer_fast::cpu
