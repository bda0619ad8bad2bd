// The gradients of the depthwise convolution's weight and bias.
//
// A task is (slice of the batch, block of channels). It slides down the maps of its images: the next rows of x are
// packed into a ring buffer, as zero-padded rows of channel vectors, and those of gy as plain ones; `accumulate` adds
// their products, a row of taps at a time, to the task's partial sums. These go to the workspace, and `reduce_partials`
// adds up those of all slices.
//
// A column of padding is a zero that is multiplied: an Inf or NaN of gy may turn any tap of its channel into NaN.
//
// Terms: docs/glossary.md.
#pragma once
#include <utility>

#include "../compensated_sum.h"
#include "../scratch.h"
#include "plan.h"
#include "ring.h"

namespace convmixer_fast::cpu {
namespace {

// The innermost loop keeps two accumulators for each of kWgradTaps taps, so many columns of gy and one vector of x in
// registers.
#if CMF_VECTOR_REGISTERS == 32
constexpr int kWgradTaps = 9;
constexpr int kWgradColumns = 8;
#else
constexpr int kWgradTaps = 5;
constexpr int kWgradColumns = 4;
#endif
static_assert(2 * kWgradTaps + kWgradColumns + 1 <= CMF_VECTOR_REGISTERS);

// acc[t] += x[c + t] * gy[c]: a vector of x is loaded once for all its taps. The columns take turns in several sets of
// accumulators: an addition waits for the one before it, and short sums are more accurate.
template <int kColumns, int kSets, int kTaps, class V>
CMF_INLINE void add_products(const V* x, const V* gy, V (&acc)[kSets][kTaps]) {
  V g[kColumns];
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c) g[c] = gy[c];
#pragma GCC unroll 32
  for (int i = 0; i < kColumns + kTaps - 1; ++i) {
    const V in = x[i];
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t)
      if (i >= t && i - t < kColumns) acc[(i - t) % kSets][t] += in * g[i - t];
  }
}

// total[t] += the sum over rows and columns of x[row][column + t] * gy[row][column].
template <class V, int kTaps>
void correlate(RingRows<V> x, const V* gy, int64_t rows, int64_t columns, CompensatedSum<V>* total) {
  constexpr int kSets = kTaps >= 3 ? 2 : 4;
  V acc[kSets][kTaps] = {};
  for (int64_t row = 0; row < rows; ++row, gy += columns, x.next()) {
    int64_t c = 0;
    for (; c + kWgradColumns <= columns; c += kWgradColumns) add_products<kWgradColumns>(x.row + c, gy + c, acc);
    for (; c + kSets <= columns; c += kSets) add_products<kSets>(x.row + c, gy + c, acc);
    for (; c < columns; ++c) add_products<1>(x.row + c, gy + c, acc);
  }
#pragma GCC unroll 4
  for (int s = 1; s < kSets; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) acc[0][t] += acc[s][t];
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) total[t].add(acc[0][t]);
}

// The same for any number of taps, in blocks of nearly the same size.
template <class V, int... kTaps>
CMF_INLINE void correlate_taps(RingRows<V> x, const V* gy, int64_t rows, int64_t columns, int64_t taps,
                               CompensatedSum<V>* total, std::integer_sequence<int, kTaps...>) {
  static constexpr void (*kCorrelate[])(RingRows<V>, const V*, int64_t, int64_t,
                                        CompensatedSum<V>*) = {correlate<V, kTaps + 1>...};
  for (int64_t blocks = ceil_div(taps, kWgradTaps); blocks > 0; --blocks) {
    const int64_t block = ceil_div(taps, blocks);
    kCorrelate[block - 1](x, gy, rows, columns, total);
    x.row += block;
    x.begin += block;
    x.end += block;
    total += block;
    taps -= block;
  }
}

template <class S>
class DepthwiseWgrad {
  using Real = typename S::Real;
  using V = Vec<Real>;
  static constexpr int kLanes = cpu::kLanes<Real>;

 public:
  DepthwiseWgrad(const WgradParams& p, Scratch& scratch) : p_(p), plan_(p) {
    const int64_t x_rows = plan_.block * plan_.ring_rows * plan_.pitch;
    const int64_t gy_rows = plan_.block * plan_.step_rows * plan_.band_width;
    const int64_t vectors = x_rows + gy_rows + 2 * plan_.block * plan_.sums;
    x_ = static_cast<V*>(scratch.reserve(vectors * sizeof(V)));
    gy_ = x_ + x_rows;
    total_ = reinterpret_cast<CompensatedSum<V>*>(gy_ + gy_rows);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / plan_.blocks;
      const int64_t first = task % plan_.blocks * plan_.block;
      channel_ = first * kLanes;
      channels_ = min(plan_.block * kLanes, p_.channels - channel_);
      for (int64_t i = 0; i < plan_.block * plan_.sums; ++i) total_[i] = {};
      last_image_ = min((slice + 1) * plan_.slice, p_.batch);
      for (image_ = slice * plan_.slice; image_ < last_image_; ++image_)
        for (int64_t w = 0; w < p_.width; w += plan_.band_width) run_band(w, min(w + plan_.band_width, p_.width));
      V* to = static_cast<V*>(p_.workspace) + (slice * plan_.vectors + first) * plan_.sums;
      for (int64_t v = 0; v * kLanes < channels_; ++v)
        for (int64_t i = v * plan_.sums; i < (v + 1) * plan_.sums; ++i) to[i] = total_[i].value();
    }
  }

 private:
  V* x_row(int64_t v, int64_t row) const { return x_ + (v * plan_.ring_rows + row % plan_.ring_rows) * plan_.pitch; }
  V* gy_row(int64_t v, int64_t row) const { return gy_ + (v * plan_.step_rows + row) * columns_; }

  // Adds what columns [w_begin, w_end) of gy contribute.
  void run_band(int64_t w_begin, int64_t w_end) {
    w_begin_ = w_begin;
    columns_ = w_end - w_begin;
    int64_t packed = 0;
    for (int64_t h = 0; h < p_.height; h += plan_.step_rows) {
      const int64_t rows = min(plan_.step_rows, p_.height - h);
      const int64_t needed = min(p_.height, h + rows - 1 + p_.kernel_h - p_.pad_top);
      pack_gy(h, rows);
      if (p_.gweight) pack_x(packed, needed);
      packed = max(packed, needed);
      for (int64_t v = 0; v * kLanes < channels_; ++v) {
        CompensatedSum<V>* total = total_ + v * plan_.sums;
        if (p_.gweight) accumulate(v, h, rows, total);
        if (p_.gbias) accumulate_bias(gy_row(v, 0), rows * columns_, total[plan_.sums - 1]);
      }
    }
  }

  void pack_gy(int64_t h, int64_t rows) {
    const Strides& stride = p_.gy_stride;
    const bool joined = columns_ == p_.width && stride.h == p_.width * stride.w;
    const S* gy = static_cast<const S*>(p_.gy) + image_ * stride.n + channel_ * stride.c + h * stride.h;
    pack_pixels<S>(
        gy + w_begin_ * stride.w, stride, channels_, rows, columns_, joined,
        [&](int64_t v, int64_t row) { return gy_row(v, row); }, [](int64_t, V*, int64_t) {});
  }

  void pack_x(int64_t begin, int64_t end) {
    const S* x = static_cast<const S*>(p_.x) + image_ * p_.x_stride.n + channel_ * p_.x_stride.c;
    const RingColumns columns{w_begin_ + plan_.first_tap - p_.pad_left, columns_ + plan_.taps - 1, plan_.pitch};
    pack_ring(
        x, p_.x_stride, p_.width, channels_, begin, end, columns, [&](int64_t v, int64_t row) { return x_row(v, row); },
        [](int64_t, V*, int64_t) {});
  }

  // Adds the products of gy's rows [h, h + rows) with x, for every tap, without the rows outside the map.
  void accumulate(int64_t v, int64_t h, int64_t rows, CompensatedSum<V>* total) const {
    RingRows<V> x{nullptr, x_row(v, 0), x_row(v, 0) + plan_.ring_rows * plan_.pitch, plan_.pitch};
    const int64_t rows_per_chain = max(1, plan_.chain / columns_);
    int64_t fetched = 0;
    for (int64_t i = 0; i < p_.kernel_h; ++i, total += plan_.taps) {
      const int64_t shift = i - p_.pad_top;
      const int64_t first = max(h, -shift);
      const int64_t last = min(h + rows, p_.height - shift);
      for (int64_t row = first; row < last; row += rows_per_chain) {
        x.row = x_row(v, row + shift);
        correlate_taps(x, gy_row(v, row - h), min(rows_per_chain, last - row), columns_, plan_.taps, total,
                       std::make_integer_sequence<int, kWgradTaps>());
      }
      // Prefetches what the next step packs, spread over the taps: a burst of misses would fill the queues and stall.
      for (; fetched * p_.kernel_h < rows * (i + 1); ++fetched) {
        prefetch(p_.gy, p_.gy_stride, v, h + rows + fetched);
        prefetch(p_.x, p_.x_stride, v, h + rows + p_.kernel_h - p_.pad_top - 1 + fetched);
      }
    }
  }

  static void accumulate_bias(const V* gy, int64_t pixels, CompensatedSum<V>& total) {
    constexpr int64_t kSums = 4;  // because an addition waits for the one before it
    CompensatedSum<V> sum[kSums];
    for (int64_t i = 0; i < pixels; i += kSums)
      for (int64_t s = 0; s < min(kSums, pixels - i); ++s) sum[s].add(gy[i + s]);
    for (const CompensatedSum<V>& other : sum) total.add(other);
  }

  // Prefetches a row of one channel vector into the L2 cache. Rows after the map's last are those of the next image.
  void prefetch(const void* tensor, const Strides& stride, int64_t v, int64_t row) const {
    const int64_t image = image_ + row / p_.height;
    if (image >= last_image_ || (image > image_ && columns_ < p_.width)) return;
    const int64_t channel = channel_ + v * kLanes;
    const S* first = static_cast<const S*>(tensor) + image * stride.n + channel * stride.c +
                     row % p_.height * stride.h + w_begin_ * stride.w;
    constexpr int64_t kLine = kCacheLine / sizeof(S);
    if (stride.c == 1) {
      for (int64_t i = 0; i < columns_; ++i) __builtin_prefetch(first + i * stride.w, 0, 2);
    } else if (stride.w == 1) {
      for (int64_t c = 0; c < min(kLanes, p_.channels - channel); ++c)
        for (int64_t i = 0; i < columns_; i += kLine) __builtin_prefetch(first + c * stride.c + i, 0, 2);
    }
  }

  const WgradParams& p_;
  const WgradPlan<Real> plan_;
  V* x_;                      // the ring buffer: (vector, row, column)
  V* gy_;                     // the rows of a step: (vector, row, column)
  CompensatedSum<V>* total_;  // the task's partial sums: (vector, sum)
  int64_t channel_;           // the block's first channel
  int64_t channels_;          // the block's number of channels
  int64_t image_;
  int64_t last_image_;  // the one after the slice's last
  int64_t w_begin_;     // the band's first column
  int64_t columns_;     // the band's width
};

// The gradients of channel vectors [begin, end), from the partial sums of all slices.
template <class S, class Real = typename S::Real>
void reduce_partials(const WgradParams& p, int64_t begin, int64_t end) {
  using V = Vec<Real>;
  constexpr int kLanes = cpu::kLanes<Real>;
  const WgradPlan<Real> plan(p);
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t vector = begin; vector < end; ++vector) {
    const int64_t channel = vector * kLanes;
    const int64_t channels = min(kLanes, p.channels - channel);
    const auto total = [&](int64_t i) {
      CompensatedSum<V> sum;
      for (int64_t slice = 0; slice < plan.slices; ++slice)
        sum.add(static_cast<const V*>(p.workspace)[(slice * plan.vectors + vector) * plan.sums + i]);
      return sum.value();
    };
    for (int64_t t = 0; p.gweight && t < taps; t += kLanes) {
      V z[kLanes];
      const int64_t count = min(kLanes, taps - t);
      for (int64_t q = 0; q < count; ++q) {
        const int64_t column = (t + q) % p.kernel_w - plan.first_tap;
        const bool meets_map = 0 <= column && column < plan.taps;
        z[q] = meets_map ? total((t + q) / p.kernel_w * plan.taps + column) : V{};
      }
      store_pixels(static_cast<S*>(p.gweight) + channel * taps + t, taps, 1, channels, count, z);
    }
    if (p.gbias) {
      const V bias = total(plan.sums - 1);
      store_pixels(static_cast<S*>(p.gbias) + channel, 1, 0, channels, 1, &bias);
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
