// The sums of a strip of neighbouring outputs, in registers.
#pragma once
#include <utility>

#include "../dtypes.h"
#include "../int_math.h"

namespace convmixer_fast::cpu {
namespace {

#if CMF_VECTOR_REGISTERS == 32  // 16 sums, 9 weights, the input
constexpr int kMaxColumns = 16, kMaxTaps = 9;
#else  // 16
constexpr int kMaxColumns = 8, kMaxTaps = 5;
#endif
constexpr int kUsualTaps = kMaxTaps / 2 + 1;  // 3, 5 and so on, and all others together
constexpr int64_t kTapsAtOnce = 45;  // are summed before they are added to the rest: more accurate than one long sum

// The longest rows of taps for which pixels are read in place, rather than packed: where it is faster (measured on
// Emerald Rapids). 16-bit values are widened anew for each row of taps, while packing does it once.
#if CMF_HAS_F16C
constexpr int kLongestOfFloat16 = 5;
#else
constexpr int kLongestOfFloat16 = 0;  // there it takes a dozen instructions
#endif
constexpr int longest_in_place(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 0;
    case DType::kFloat32: return kMaxTaps;
    case DType::kFloat16: return kLongestOfFloat16;
    case DType::kBFloat16: return 5;
  }
  __builtin_unreachable();
}

// Cache lines for a strip to prefetch: `count` of them, `step` bytes apart.
struct Lines {
  const char* first;
  int64_t step, count;
  int64_t column;  // bytes from the strip's first line to that of a strip one column to the right
};

// What a strip of neighbouring outputs of one row reads: those of one channel vector, or of several.
// Input: a vector for each pixel; or where in memory its channels lie, as const S*, the Weights then being vectors.
template <class Real, class Input = Vec<Real>, class Weight = Input>
struct Strip {
  const Input* first;       // the input under the first tap of the first output
  const Input* ring_begin;  // where the rows after the last one of the ring continue: at the strip's column
  const Input* ring_end;
  int64_t pitch;  // from row to row
  const Weight* weight;
  int64_t weight_pitch;
  int64_t tap_rows, taps;
  Vec<Real> start;             // what the sums start from
  Lines read, write;           // that are needed soon
  int64_t vectors = 1;         // channel vectors; more than one for inputs in memory only
  int64_t vector_weights = 0;  // from one vector's weights to the next one's
  int64_t vector_bytes = 0;    // in memory, for prefetching
  int64_t last_channel = 0;    // where the last vector begins: it may overlap the one before
};

template <class Input>
CMF_INLINE const Input& fetch(const Input& input, int64_t) {
  return input;
}
template <class S>
CMF_INLINE Vec<typename S::Real> fetch(const S* const& pixel, int64_t channel) {
  return S::load(pixel + channel);
}

// Where a strip is among its tap rows. The lines it prefetches are spread over them: a burst of misses would fill the
// queues and stall.
template <class Real, class Input, class Weight>
struct TapRows {
  const Strip<Real, Input, Weight>& strip;
  const Input* input = strip.first;
  const Weight* weight = strip.weight;
  int64_t channel = 0, first_byte = 0;  // where the channel vector begins
  int64_t passed = 0;

  CMF_INLINE void start_vector(int64_t v) {
    input = strip.first;
    weight = strip.weight + v * strip.vector_weights;
    channel = min(v * kLanes<Real>, strip.last_channel);
    first_byte = v * strip.vector_bytes;
    passed = 0;
  }

  CMF_INLINE auto load(const Input* from) const { return fetch(*from, channel); }

  CMF_INLINE void next() {
    input += strip.pitch;
    if (input >= strip.ring_end) input = strip.ring_begin;
    weight += strip.weight_pitch;
    prefetch<0>(strip.read);
    prefetch<1>(strip.write);
    ++passed;
  }

 private:
  template <int kWrite>
  CMF_INLINE void prefetch(const Lines& lines) const {
    if (first_byte % 64) return;  // the line is that of the vector before
    for (int64_t l = passed; l < lines.count; l += strip.tap_rows)
      __builtin_prefetch(lines.first + first_byte + l * lines.step, kWrite, 2);
  }
};

// sum[c] += input[c + t] * weight[t] for kTaps taps of a row, from `tap` on: an input is loaded once for all of them.
template <int kTaps, class Real, class Input, class Weight, int kColumns>
CMF_INLINE void add_taps(const TapRows<Real, Input, Weight>& at, int64_t tap, Vec<Real> (&sum)[kColumns]) {
  Weight w[kTaps];
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) w[t] = at.weight[tap + t];
#pragma GCC unroll 32
  for (int i = 0; i < kColumns + kTaps - 1; ++i) {
    const auto in = at.load(at.input + tap + i);
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t)
      if (i >= t && i - t < kColumns) sum[i - t] = multiply_add(sum[i - t], in, w[t]);
  }
}

template <class Real, class Input, class Weight, int kColumns, int... kGroup>
CMF_INLINE void add_tap_group(int64_t taps, const TapRows<Real, Input, Weight>& at, int64_t tap,
                              Vec<Real> (&sum)[kColumns], std::integer_sequence<int, kGroup...>) {
  (void)((taps == kGroup + 1 && (add_taps<kGroup + 1>(at, tap, sum), true)) || ...);
}

// sum[c] += input[c + t] * weight[t] for `rows` rows of kTaps taps. Where a row ends, fewer and fewer taps have sums to
// go to, and where one begins, few have: the one's end and the next one's beginning are done together, tap by tap.
template <int kTaps, class Real, class Input, class Weight, int kColumns>
CMF_INLINE void add_rows(TapRows<Real, Input, Weight>& at, int64_t rows, Vec<Real> (&sum)[kColumns]) {
  static_assert(kColumns >= kTaps - 1, "else a sum would get the next row's products before this one's");
  const auto add = [&](int i, const auto& in, const Weight& weight, int t)
                       CMF_INLINE_LAMBDA { sum[i - t] = multiply_add(sum[i - t], in, weight); };
  Weight w[kTaps];
#pragma GCC unroll 16
  for (int i = 0; i < kTaps - 1; ++i) {
    const auto in = at.load(at.input + i);
    w[i] = at.weight[i];
#pragma GCC unroll 16
    for (int t = 0; t <= i; ++t) add(i, in, w[t], t);
  }
  w[kTaps - 1] = at.weight[kTaps - 1];
  for (;;) {
#pragma GCC unroll 16
    for (int i = kTaps - 1; i < kColumns; ++i) {
      const auto in = at.load(at.input + i);
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t) add(i, in, w[t], t);
    }
    const Input* end = at.input + kColumns;
    at.next();
    if (--rows == 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kTaps - 1; ++i) {
        const auto last = at.load(end + i);
#pragma GCC unroll 16
        for (int t = i + 1; t < kTaps; ++t) add(kColumns + i, last, w[t], t);
      }
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTaps - 1; ++i) {
      const auto last = at.load(end + i), in = at.load(at.input + i);
#pragma GCC unroll 16
      for (int t = i + 1; t < kTaps; ++t) add(kColumns + i, last, w[t], t);
      w[i] = at.weight[i];
#pragma GCC unroll 16
      for (int t = 0; t <= i; ++t) add(i, in, w[t], t);
    }
    w[kTaps - 1] = at.weight[kTaps - 1];
  }
}

// Channel vector by channel vector. kTaps: of a row of the kernel, if they are the usual 3, 5, 7 or 9; 0 stands for any
// other number.
template <class Real, class Input, class Weight, int kColumns, int kTaps>
void convolve_strip(const Strip<Real, Input, Weight>& strip, Vec<Real>* out) {
  const int64_t taps = kTaps > 0 ? kTaps : strip.taps, group = equal_share(taps, kMaxTaps);
  // Rows are summed together, or, if they are long, piece by piece.
  const bool is_long = taps > kTapsAtOnce / 2;
  const int64_t piece = is_long ? group * max(1, kTapsAtOnce / 2 / group) : taps;
  const int64_t sums = ceil_div(strip.tap_rows * taps, kTapsAtOnce);
  const int64_t rows_at_once = is_long ? 1 : sums == 1 ? strip.tap_rows : ceil_div(strip.tap_rows, sums);
  TapRows<Real, Input, Weight> at{strip};
  for (int64_t v = 0; v < strip.vectors; ++v, out += kColumns) {
    at.start_vector(v);
    bool is_first = true;
    for (int64_t left = strip.tap_rows, tap = 0; left > 0;) {
      const int64_t rows = min(rows_at_once, left), end = min(taps, tap + piece);
      Vec<Real> sum[kColumns];
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) sum[c] = is_first ? strip.start : Vec<Real>{};
      if constexpr (kTaps > 0 && kColumns >= kTaps - 1) {
        add_rows<kTaps>(at, rows, sum);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t t = tap; t < end; t += group)
            add_tap_group(min(group, end - t), at, t, sum, std::make_integer_sequence<int, kMaxTaps>());
          if (end == taps) at.next();
        }
      }
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) out[c] = is_first ? sum[c] : out[c] + sum[c];
      is_first = false;
      tap = end < taps ? end : 0;
      if (tap == 0) left -= rows;
    }
  }
}

// The taps of a row, as kinds: 1, 2 and so on for 3, 5 and so on, kMaxTaps at most; 0 for any other number.
template <int kFirstKind, int kKinds, class Real, class Input, class Weight, int... kIndex>
CMF_INLINE void convolve_strip(const Strip<Real, Input, Weight>& strip, int64_t columns, Vec<Real>* out,
                               std::integer_sequence<int, kIndex...>) {
  static constexpr auto taps_of = [](int kind) { return kind > 0 ? 2 * kind + 1 : 0; };
  static constexpr void (*kConvolve[])(const Strip<Real, Input, Weight>&, Vec<Real>*) = {
      convolve_strip<Real, Input, Weight, kIndex / kKinds + 1, taps_of(kFirstKind + kIndex % kKinds)>...};
  const int64_t kind = strip.taps % 2 == 1 && strip.taps <= kMaxTaps ? strip.taps / 2 : 0;
  kConvolve[(columns - 1) * kKinds + kind - kFirstKind](strip, out);
}

// At most kMaxColumns outputs of each channel vector, one vector's after the other's.
template <class Real, class Input, class Weight>
CMF_INLINE void convolve_strip(const Strip<Real, Input, Weight>& strip, int64_t columns, Vec<Real>* out) {
  convolve_strip<0, kUsualTaps>(strip, columns, out, std::make_integer_sequence<int, kMaxColumns * kUsualTaps>());
}
template <class Real, class S>
CMF_INLINE void convolve_strip(const Strip<Real, const S*, Vec<Real>>& strip, int64_t columns, Vec<Real>* out) {
  constexpr int kKinds = longest_in_place(S::kDType) / 2;
  convolve_strip<1, kKinds>(strip, columns, out, std::make_integer_sequence<int, kMaxColumns * kKinds>());
}

// f(first, length) for strips of nearly the same length, at most kMaxColumns.
template <class F>
CMF_INLINE void for_strips(int64_t columns, F f) {
  for (int64_t first = 0, length; first < columns; first += length) {
    length = equal_share(columns - first, kMaxColumns);
    f(first, length);
  }
}

// The outputs of a row, strip by strip; moves `strip` along.
template <class Real, class Input, class Weight>
void convolve_row(Strip<Real, Input, Weight>& strip, int64_t columns, Vec<Real>* out) {
  for_strips(columns, [&](int64_t first, int64_t length) {
    convolve_strip(strip, length, out + first);
    strip.first += length;
    strip.ring_begin += length;
    strip.ring_end += length;
    strip.read.first += length * strip.read.column;
    strip.write.first += length * strip.write.column;
  });
}

}  // namespace
}  // namespace convmixer_fast::cpu
