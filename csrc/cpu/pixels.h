// Pixels between tensors of any strides and vectors. A vector holds neighbouring channels of one pixel, whatever the
// layout of x: only `load_pixels` and `store_pixels` know strides.
#pragma once
#include "dtypes.h"
#include "int_math.h"

namespace convmixer_fast::cpu {
namespace {

// `pixels` vectors of `channels` values from memory, both at most kLanes; the lanes beyond are 0.
template <class S, class Real = typename S::Real>
void load_pixels(const S* x, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t pixels,
                 Vec<Real>* v) {
  constexpr int n = kLanes<Real>;
  if (channel_stride == 1 && channels == n) {
    for (int64_t q = 0; q < pixels; ++q) v[q] = S::load(x + q * pixel_stride);
  } else if (pixel_stride == 1 && pixels == n) {
    Vec<Real> rows[n];
    for (int64_t c = 0; c < n; ++c) rows[c] = c < channels ? S::load(x + c * channel_stride) : Vec<Real>{};
    transpose<n / 2>(rows);
    for (int64_t q = 0; q < n; ++q) v[q] = rows[q];
  } else {
    for (int64_t q = 0; q < pixels; ++q) {
      S lanes[n] = {};
      for (int64_t c = 0; c < channels; ++c) lanes[c] = x[q * pixel_stride + c * channel_stride];
      v[q] = S::load(lanes);
    }
  }
}

template <class S, class Real = typename S::Real>
void store_pixels(S* y, int64_t channel_stride, int64_t pixel_stride, int64_t channels, int64_t pixels,
                  const Vec<Real>* v) {
  constexpr int n = kLanes<Real>;
  if (channel_stride == 1 && channels == n) {
    for (int64_t q = 0; q < pixels; ++q) S::store(y + q * pixel_stride, v[q]);
  } else if (pixel_stride == 1 && pixels == n) {
    Vec<Real> rows[n];
    for (int64_t q = 0; q < n; ++q) rows[q] = v[q];
    transpose<n / 2>(rows);
    for (int64_t c = 0; c < channels; ++c) S::store(y + c * channel_stride, rows[c]);
  } else {
    for (int64_t q = 0; q < pixels; ++q) {
      S lanes[n];
      S::store(lanes, v[q]);
      for (int64_t c = 0; c < channels; ++c) y[q * pixel_stride + c * channel_stride] = lanes[c];
    }
  }
}

// f(row, column, n) for up to kGroup successive pixels (row, column), ..., row by row; `joined`: across rows' ends.
template <int kGroup, class F>
CMF_INLINE void for_pixel_groups(int64_t rows, int64_t columns, bool joined, F f) {
  const int64_t runs = joined ? 1 : rows, length = joined ? rows * columns : columns;
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t i = 0; i < length; i += kGroup) f(run + i / columns, i % columns, min(kGroup, length - i));
}

// The pixels of `rows` x `columns` from memory: those of channel vector v and of a row go, after
// `change(v, pixels, n)`, to the vectors from `row_of(v, row)` on. `joined`: a row starts in memory where the one
// before it ends.
template <class S, class RowOf, class Change, class V = Vec<typename S::Real>>
CMF_INLINE void pack_pixels(const S* x, const Strides& stride, int64_t channels, int64_t rows, int64_t columns,
                            bool joined, RowOf row_of, Change change) {
  constexpr int kLanes = cpu::kLanes<typename S::Real>;
  for_pixel_groups<kLanes>(rows, columns, joined, [&](int64_t row, int64_t column, int64_t n) {
    const S* from = x + row * stride.h + column * stride.w;
    for (int64_t v = 0; v * kLanes < channels; ++v) {
      V* to = row_of(v, row) + column;
      V buffer[kLanes];
      V* z = column + n <= columns ? to : buffer;  // one row, or the end of one and the start of the next
      load_pixels(from + v * kLanes * stride.c, stride.c, stride.w, min(kLanes, channels - v * kLanes), n, z);
      change(v, z, n);
      if (z == buffer) {
        int64_t r = row, c = column;
        for (int64_t i = 0; i < n; ++i) {
          *to++ = z[i];
          if (++c == columns) c = 0, to = row_of(v, ++r);
        }
      }
    }
  });
}

}  // namespace
}  // namespace convmixer_fast::cpu
