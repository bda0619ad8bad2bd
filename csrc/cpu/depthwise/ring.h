// The last rows of the input, packed into vectors and padded, in a ring.
#pragma once
#include "../pixels.h"

namespace convmixer_fast::cpu {
namespace {

// What the rows of a ring hold: `used` columns from the map's column `origin` on, zeros beside the map and up to
// `pitch`.
struct RingColumns {
  int64_t origin, used, pitch;
};

// Rows [begin, end) of an image's channels into the rows row_of(channel vector, row); `change` as in pack_pixels.
template <class S, class RowOf, class Change, class V = Vec<typename S::Real>>
CMF_INLINE void pack_ring(const S* x, const Strides& stride, int64_t width, int64_t channels, int64_t begin,
                          int64_t end, RingColumns columns, RowOf row_of, Change change) {
  const int64_t first = max(0, columns.origin), last = min(width, columns.origin + columns.used);
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

// Rows of a ring, from one of them on.
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
