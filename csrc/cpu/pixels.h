// Pixels between tensors of any strides and channel vectors. Whatever the layout of a tensor, a channel vector holds
// neighbouring channels of one pixel; only `load_pixels` and `store_pixels` know strides.
//
// Terms: docs/glossary.md.
#pragma once
#include "dtypes.h"
#include "int_math.h"

namespace convmixer_fast::cpu {
namespace {

// `pixels` vectors of `channels` values from memory, both at most kLanes; the lanes beyond are 0.
template <class S, class Real = typename S::Real>
void load_pixels(const S* x, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t pixels,
                 Vec<Real>* v) {
  constexpr int kLanes = cpu::kLanes<Real>;
  if (channel_stride == 1 && channels == kLanes) {
    for (int64_t p = 0; p < pixels; ++p) v[p] = S::load(x + p * pixel_stride);
  } else if (pixel_stride == 1 && pixels == kLanes) {
    Vec<Real> rows[kLanes];  // which stay in registers, as all loops are unrolled
#pragma GCC unroll 16
    for (int64_t c = 0; c < kLanes; ++c) rows[c] = c < channels ? S::load(x + c * channel_stride) : Vec<Real>{};
    transpose<kLanes / 2>(rows);
#pragma GCC unroll 16
    for (int64_t p = 0; p < kLanes; ++p) v[p] = rows[p];
  } else {
    for (int64_t p = 0; p < pixels; ++p) {
      S lanes[kLanes] = {};
      for (int64_t c = 0; c < channels; ++c) lanes[c] = x[p * pixel_stride + c * channel_stride];
      v[p] = S::load(lanes);
    }
  }
}

// The inverse of load_pixels.
template <class S, class Real = typename S::Real>
void store_pixels(S* y, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t pixels,
                  const Vec<Real>* v) {
  constexpr int kLanes = cpu::kLanes<Real>;
  if (channel_stride == 1 && channels == kLanes) {
    for (int64_t p = 0; p < pixels; ++p) S::store(y + p * pixel_stride, v[p]);
  } else if (pixel_stride == 1 && pixels == kLanes) {
    Vec<Real> rows[kLanes];
#pragma GCC unroll 16
    for (int64_t p = 0; p < kLanes; ++p) rows[p] = v[p];
    transpose<kLanes / 2>(rows);
#pragma GCC unroll 16
    for (int64_t c = 0; c < kLanes; ++c)
      if (c < channels) S::store(y + c * channel_stride, rows[c]);
  } else {
    for (int64_t p = 0; p < pixels; ++p) {
      S lanes[kLanes];
      S::store(lanes, v[p]);
      for (int64_t c = 0; c < channels; ++c) y[p * pixel_stride + c * channel_stride] = lanes[c];
    }
  }
}

// Calls f(row, column, count) for runs of up to kMaxCount successive pixels that begin at (row, column), row by row. If
// the rows are `joined`, a run may continue in the next row.
template <int kMaxCount, class F>
CMF_INLINE void for_pixel_runs(int64_t rows, int64_t columns, bool joined, F f) {
  int64_t row = 0;
  int64_t column = 0;
  for (int64_t left = rows * columns, count; left > 0; left -= count) {
    count = min(kMaxCount, joined ? left : columns - column);
    f(row, column, count);
    for (column += count; column >= columns; column -= columns) ++row;
  }
}

// Packs `rows` x `columns` pixels: those of channel vector v and of a row go, after `change(v, pixels, count)`, to the
// vectors from `row_of(v, row)` on. `joined` says that each row starts in memory where the one before it ends.
template <class S, class RowOf, class Change, class V = Vec<typename S::Real>>
CMF_INLINE void pack_pixels(const S* x, const Strides& stride, int64_t channels, int64_t rows, int64_t columns,
                            bool joined, RowOf row_of, Change change) {
  constexpr int kLanes = cpu::kLanes<typename S::Real>;
  const int64_t vectors = ceil_div(channels, kLanes);
  // What shares a cache line is read together: the channels of a run, or the runs of a channel vector. The latter's
  // lines are often a multiple of 4 KB apart, and more vectors of them at a time than one would not fit the L1 cache.
  const int64_t together = stride.c == 1 ? vectors : 1;
  for (int64_t first = 0; first < vectors; first += together) {
    for_pixel_runs<kLanes>(rows, columns, joined, [&](int64_t row, int64_t column, int64_t count) {
      const S* from = x + row * stride.h + column * stride.w;
      for (int64_t v = first; v < first + together; ++v) {
        V* to = row_of(v, row) + column;
        V buffer[kLanes];
        V* z = column + count <= columns ? to : buffer;  // the buffer if the run continues in the next row
        load_pixels(from + v * kLanes * stride.c, stride.c, stride.w, min(kLanes, channels - v * kLanes), count, z);
        change(v, z, count);
        if (z == buffer) {
          int64_t r = row;
          int64_t c = column;
          for (int64_t i = 0; i < count; ++i) {
            *to++ = z[i];
            if (++c == columns) {
              c = 0;
              to = row_of(v, ++r);
            }
          }
        }
      }
    });
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
