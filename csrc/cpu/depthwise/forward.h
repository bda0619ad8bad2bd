// The depthwise convolution.
//
// A task is (image, block of channels, band of rows, band of columns). It slides down its band: `pack` turns the next
// input rows into zero-padded rows of channel vectors in a ring buffer, `convolve` sums the taps, `store_rows` applies
// the epilogue and stores. Small kernels on channels_last maps, for which packing would take longer than the sums, keep
// the pixels' addresses in the ring buffer instead, and read them in place.
//
// Terms: docs/glossary.md.
#pragma once
#include <type_traits>

#include "../activation.h"
#include "../scratch.h"
#include "plan.h"
#include "ring.h"

namespace convmixer_fast::cpu {
namespace {

template <class V>
void reverse(V* v, int64_t count) {
  for (int64_t i = 0; i < count / 2; ++i) {
    const V first = v[i];
    v[i] = v[count - 1 - i];
    v[count - 1 - i] = first;
  }
}

template <class S>
class Depthwise {
  using Real = typename S::Real;
  using V = Vec<Real>;
  static constexpr int kLanes = cpu::kLanes<Real>;

 public:
  Depthwise(const DepthwiseParams& p, Scratch& scratch) : p_(p), plan_(p) {
    const int64_t weights = plan_.vectors * p_.kernel_h * p_.kernel_w;
    const int64_t vectors = weights + plan_.ring_size() + plan_.sums_size() + 2 * plan_.vectors;
    constexpr int64_t kElementwise = sizeof(Elementwise<Real>);
    void* memory = scratch.reserve(vectors * sizeof(V) + 2 * plan_.vectors * kElementwise);
    weight_ = static_cast<V*>(memory);
    ring_ = weight_ + weights;
    pixel_ring_ = reinterpret_cast<const S**>(ring_);
    sums_ = ring_ + plan_.ring_size();
    start_ = sums_ + plan_.sums_size();
    zeros_ = start_ + plan_.vectors;
    for (int64_t v = 0; v < plan_.vectors; ++v) zeros_[v] = V{};
    prologue_ = reinterpret_cast<Elementwise<Real>*>(zeros_ + plan_.vectors);
    epilogue_ = prologue_ + plan_.vectors;
  }

  void run(int64_t begin, int64_t end) {
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      // (set of images, block, image of the set, band of rows, band of columns), the last one fastest
      const int64_t bands = plan_.height_bands * plan_.width_bands;
      const int64_t first_image = task / (plan_.images * plan_.blocks * bands) * plan_.images;
      const int64_t images = min(plan_.images, p_.batch - first_image);
      const int64_t rest = task - first_image * plan_.blocks * bands;
      const int64_t block = rest / (images * bands);
      image_ = first_image + rest / bands % images;
      if (block != loaded) load_block(block);
      loaded = block;
      const int64_t h = rest / plan_.width_bands % plan_.height_bands * plan_.band_height;
      const int64_t w = rest % plan_.width_bands * plan_.band_width;
      run_band(h, min(h + plan_.band_height, p_.height), w, min(w + plan_.band_width, p_.width));
    }
  }

 private:
  // The first channel of a block's vector.
  int64_t offset_of(int64_t vector) const {
    return plan_.in_place ? min(vector * kLanes, channels_ - kLanes) : vector * kLanes;
  }
  int64_t channels_of(int64_t vector) const { return max(0, min(kLanes, channels_ - offset_of(vector))); }
  V* ring_row(int64_t vector, int64_t row) const {
    return ring_ + (vector * plan_.ring_rows + row % plan_.ring_rows) * plan_.pitch;
  }
  const S** pixel_ring_row(int64_t row) const { return pixel_ring_ + row % plan_.ring_rows * plan_.pitch; }

  void load_block(int64_t block) {
    channel_ = block * plan_.block_channels;
    channels_ = block + 1 == plan_.blocks ? p_.channels - channel_ : plan_.block_channels;
    const int64_t taps = p_.kernel_h * p_.kernel_w;
    for (int64_t v = 0; v * kLanes < channels_; ++v) {
      const int64_t channel = channel_ + offset_of(v);
      const S* weight = static_cast<const S*>(p_.weight) + channel * taps;
      for (int64_t t = 0; t < taps; t += kLanes)
        load_pixels(weight + t, taps, 1, channels_of(v), min(kLanes, taps - t), weight_ + v * taps + t);
      if (p_.flip_taps) reverse(weight_ + v * taps, taps);
      prologue_[v] = load_elementwise<S>(p_.prologue, p_.dtype, channel, channels_of(v));
      epilogue_[v] = load_elementwise<S>(p_.epilogue, p_.dtype, channel, channels_of(v));
      // Few taps: the sums start from the bias, which saves a rounding. Many: it would enlarge every partial sum.
      start_[v] = plan_.few_taps ? epilogue_[v].bias : V{};
      if (plan_.few_taps) epilogue_[v].bias = V{};
    }
  }

  // Outputs [h_begin, h_end) x [w_begin, w_end) of the image and the block.
  void run_band(int64_t h_begin, int64_t h_end, int64_t w_begin, int64_t w_end) {
    w_begin_ = w_begin;
    columns_ = w_end - w_begin;
    row_plan_ = RowPlan(columns_, p_.kernel_h, plan_.taps);
    origin_ = w_begin + plan_.first_tap - p_.pad_left;
    int64_t packed = max(0, h_begin - p_.pad_top);
    for (int64_t h = h_begin; h < h_end; h += plan_.step_rows) {
      const int64_t rows = min(plan_.step_rows, h_end - h);
      const int64_t needed = min(p_.height, h + rows - 1 + p_.kernel_h - p_.pad_top);
      if constexpr (longest_in_place(S::kDType) > 0) {
        if (plan_.in_place) {
          for (; packed < needed; ++packed) locate(packed);
          run_row_in_place(h);
          continue;
        }
      }
      pack(packed, needed);
      packed = max(packed, needed);
      for (int64_t v = 0; v * kLanes < channels_; ++v) {
        for (int64_t r = 0; r < rows; ++r) {
          const PrefetchLines read = lines(p_.x, p_.x_stride, v, packed + r);
          const PrefetchLines write = lines(p_.y, p_.y_stride, v, h + r);
          convolve(v, h + r, sums_ + r * columns_, read, write);
        }
        store_rows(v, h, rows);
      }
    }
  }

  // Fills a row of the ring buffer with the addresses of the row's pixels; beside the map, with that of zeros.
  void locate(int64_t row) {
    const S** to = pixel_ring_row(row);
    const int64_t first = max(0, -origin_);
    const int64_t last = min(columns_ + plan_.taps - 1, p_.width - origin_);
    const S* from = address_of(p_.x, p_.x_stride, row, origin_ + first);
    const S* const zeros = reinterpret_cast<const S*>(zeros_);
    for (int64_t i = 0; i < first; ++i) to[i] = zeros;
    for (int64_t i = first; i < last; ++i) to[i] = from + (i - first) * p_.x_stride.w;
    for (int64_t i = last; i < columns_ + plan_.taps - 1; ++i) to[i] = zeros;
  }

  // The address of the block's first channel of a pixel.
  template <class T>
  auto address_of(T* tensor, const Strides& stride, int64_t h, int64_t w) const {
    using Element = std::conditional_t<std::is_const_v<T>, const S, S>;
    return static_cast<Element*>(tensor) + image_ * stride.n + channel_ * stride.c + h * stride.h + w * stride.w;
  }

  // Strip by strip, each with all channels of the block: what lies together is read and written together.
  void run_row_in_place(int64_t h) const {
    const int64_t top = h - p_.pad_top;
    const int64_t first = max(0, top);
    const int64_t last = min(p_.height, top + p_.kernel_h);
    Strip<Real, const S*, V> strip = {};
    strip.pitch = plan_.pitch;
    strip.weight = weight_ + (first - top) * p_.kernel_w + plan_.first_tap;
    strip.weight_pitch = p_.kernel_w;
    row_plan_.apply_to(strip, last - first);
    strip.vectors = ceil_div(channels_, kLanes);
    strip.vector_weights = p_.kernel_h * p_.kernel_w;
    strip.vector_bytes = kLanes * sizeof(S);
    strip.last_channel = channels_ - kLanes;
    row_plan_.for_each_strip([&](int64_t column, int64_t length) {
      strip.first = pixel_ring_row(first) + column;
      strip.ring_begin = pixel_ring_ + column;
      strip.ring_end = strip.ring_begin + plan_.ring_rows * plan_.pitch;
      strip.read = pixel_lines(p_.x, p_.x_stride, top + p_.kernel_h, column, length);
      strip.write = pixel_lines(p_.y, p_.y_stride, h + 1, column, length);
      convolve_strip(strip, length, sums_);
      const S* const* z = pixel_ring_row(h) + w_begin_ - origin_ + column;
      for (int64_t v = 0; v < strip.vectors; ++v) store_strip(v, sums_ + v * length, length, z, h, w_begin_ + column);
    });
  }

  // The lines of the first channel vector of a strip's pixels; none for rows that the map does not have.
  PrefetchLines pixel_lines(const void* tensor, const Strides& stride, int64_t h, int64_t column,
                            int64_t columns) const {
    const char* first = reinterpret_cast<const char*>(address_of(tensor, stride, h, w_begin_ + column));
    return {first, stride.w * int64_t(sizeof(S)), h < p_.height ? columns : 0, 0};
  }

  // Applies the epilogue and the residual to one channel vector's strip, and stores it. z points to the addresses of
  // the strip's inputs.
  void store_strip(int64_t v, V* sums, int64_t columns, const S* const* z, int64_t h, int64_t w) const {
    const int64_t channel = offset_of(v);
    const int64_t step = p_.y_stride.w;
    S* to = address_of(p_.y, p_.y_stride, h, w) + channel;
    const bool adds = p_.residual;
    epilogue_[v].apply(sums, columns, [=](int64_t i, V sum) CMF_INLINE_LAMBDA {
      S::store(to + i * step, adds ? sum + S::load(z[i] + channel) : sum);
    });
  }

  void pack(int64_t begin, int64_t end) {
    const S* x = static_cast<const S*>(p_.x) + image_ * p_.x_stride.n + channel_ * p_.x_stride.c;
    const RingColumns columns{origin_, columns_ + plan_.taps - 1, plan_.pitch};
    pack_ring(
        x, p_.x_stride, p_.width, channels_, begin, end, columns,
        [&](int64_t v, int64_t row) { return ring_row(v, row); },
        [&](int64_t v, V* z, int64_t count) {
          if (!p_.has_prologue) return;
          prologue_[v].apply(z, count);
          for (int64_t i = 0; i < count; ++i) z[i] = S::round(z[i]);
        });
  }

  // The lines of a row that one channel vector's strip will touch; none for rows that the map does not have.
  PrefetchLines lines(const void* tensor, const Strides& stride, int64_t v, int64_t h) const {
    const int64_t offset = image_ * stride.n + (channel_ + v * kLanes) * stride.c + h * stride.h + w_begin_ * stride.w;
    const char* first = reinterpret_cast<const char*>(static_cast<const S*>(tensor) + offset);
    constexpr int64_t kSize = sizeof(S);
    if (h >= p_.height) return {first, 0, 0, 0};
    if (stride.c == 1)
      return {first, stride.w * kSize, v * kLanes * kSize % kCacheLine ? 0 : kMaxColumns, stride.w * kSize};
    return {first, stride.c * kSize, kLanes, stride.w * kSize};
  }

  // The sums of row h, without the tap rows outside the map.
  void convolve(int64_t v, int64_t h, V* out, const PrefetchLines& read, const PrefetchLines& write) const {
    const int64_t top = h - p_.pad_top;
    const int64_t first = max(0, top);
    const int64_t last = min(p_.height, top + p_.kernel_h);
    Strip<Real> strip;
    strip.first = ring_row(v, first);
    strip.ring_begin = ring_row(v, 0);
    strip.ring_end = strip.ring_begin + plan_.ring_rows * plan_.pitch;
    strip.pitch = plan_.pitch;
    strip.weight = weight_ + (v * p_.kernel_h + first - top) * p_.kernel_w + plan_.first_tap;
    strip.weight_pitch = p_.kernel_w;
    row_plan_.apply_to(strip, last - first);
    strip.start = start_[v];
    strip.read = read;
    strip.write = write;
    convolve_row(strip, row_plan_, out);
  }

  // Applies the epilogue and the residual to rows [h, h + rows), and stores them.
  void store_rows(int64_t v, int64_t h, int64_t rows) const {
    const Strides& stride = p_.y_stride;
    const bool joined = columns_ == p_.width && stride.h == p_.width * stride.w;
    S* y = static_cast<S*>(p_.y) + image_ * stride.n + (channel_ + v * kLanes) * stride.c;
    for_pixel_runs<kLanes>(rows, columns_, joined, [&](int64_t row, int64_t column, int64_t count) {
      V* sum = sums_ + row * columns_ + column;
      epilogue_[v].apply(sum, count);
      if (p_.residual) {
        int64_t r = row;
        int64_t c = column;
        const V* z = ring_row(v, h + r) + w_begin_ - origin_;
        for (int64_t i = 0; i < count; ++i) {
          sum[i] += z[c];
          if (++c == columns_) {
            c = 0;
            z = ring_row(v, h + ++r) + w_begin_ - origin_;
          }
        }
      }
      S* to = y + (h + row) * stride.h + (w_begin_ + column) * stride.w;
      store_pixels(to, stride.c, stride.w, channels_of(v), count, sum);
    });
  }

  const DepthwiseParams& p_;
  const ForwardPlan<Real> plan_;
  V* weight_;             // (vector, tap), of the block
  V* ring_;               // (vector, row, column)
  V* sums_;               // (row, column) of a step, or (vector, column) of a strip that is read in place
  V* start_;              // (vector): what the sums start from
  V* zeros_;              // as many vectors as a block has
  const S** pixel_ring_;  // the ring buffer, (row, column), of pixels that are read in place
  Elementwise<Real>* prologue_;
  Elementwise<Real>* epilogue_;
  int64_t channel_;   // the block's first channel
  int64_t channels_;  // the block's number of channels
  int64_t image_;
  int64_t w_begin_;   // the band's first column
  int64_t columns_;   // the band's width
  RowPlan row_plan_;  // for the band's width
  int64_t origin_;    // the map's column in column 0 of the ring buffer
};

}  // namespace
}  // namespace convmixer_fast::cpu
