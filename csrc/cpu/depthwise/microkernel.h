// The depthwise microkernel: a strip, that is up to kMaxColumns neighbouring outputs of a row, in accumulators. Inputs
// are loaded once for all taps of a row that need them.
//
// Terms: docs/glossary.md.
#pragma once
#include <utility>

#include "../cpu_info.h"
#include "../dtypes.h"
#include "../int_math.h"

namespace convmixer_fast::cpu {
namespace {

// kMaxColumns: accumulators of a strip. Each is added to again after a few multiply-adds, so that the fewer there are,
// the more their latency shows. kMaxTaps: weights held beside them, where a tap row is too long to be held as a whole.
// kMaxRowTaps: the longest tap row that is, with fewer accumulators if need be.
#if CMF_VECTOR_REGISTERS == 32
constexpr int kMaxColumns = 16;
constexpr int kMaxTaps = 9;
constexpr int kMaxRowTaps = 9;
#else
constexpr int kMaxColumns = 11;
constexpr int kMaxTaps = 3;
constexpr int kMaxRowTaps = 5;
#endif

// Whether a tap row of this length is held in registers as a whole, by an instantiation of its own.
constexpr bool is_held_as_a_whole(int64_t taps) { return taps % 2 == 1 && taps > 1 && taps <= kMaxRowTaps; }

// The columns of the longest strip for tap rows of this length: as many as there are registers for, beside the weights
// that are held, an input and a spare.
constexpr int64_t most_columns(int64_t taps) {
  return min(kMaxColumns, CMF_VECTOR_REGISTERS - 2 - (is_held_as_a_whole(taps) ? taps : kMaxTaps));
}
static_assert(most_columns(kMaxTaps) == kMaxColumns);

// About how many taps are summed before they are added to the rest, which is more accurate than one long sum; a chain
// has whole tap rows.
constexpr int64_t kTapsPerChain = 45;

// The longest tap rows for which pixels are read in place because packing them would take longer (measured on Emerald
// Rapids). 16-bit values are widened again for each tap row, while packing widens them once.
constexpr int longest_in_place(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 0;
    case DType::kFloat32: return kMaxRowTaps;
    case DType::kFloat16: return CMF_HAS_F16C ? 5 : 0;  // without F16C, widening takes a dozen instructions
    case DType::kBFloat16: return 5;
  }
  __builtin_unreachable();
}

// Cache lines for a strip to prefetch.
struct PrefetchLines {
  const char* first;
  int64_t step;    // bytes from line to line
  int64_t count;   // lines
  int64_t column;  // bytes from the first line to that of a strip one column to the right
};

// A strip's work, for one channel vector or for several. Inputs are vectors, one per pixel; or, for pixels that are
// read in place, pointers (const S*) to where their channels lie in memory, and then the Weights are vectors.
template <class Real, class Input = Vec<Real>, class Weight = Input>
struct Strip {
  const Input* first;       // the input under the first tap of the first output
  const Input* ring_begin;  // where the row after the ring buffer's last one continues, at the strip's column
  const Input* ring_end;    // the end of the ring buffer, at the strip's column
  int64_t pitch;            // inputs from row to row
  const Weight* weight;     // the first tap
  int64_t weight_pitch;     // weights from tap row to tap row
  int64_t tap_rows;
  int64_t taps;                // per tap row
  int64_t tap_block;           // taps whose weights are in registers at the same time, of rows too long to be held
  int64_t chain_rows;          // tap rows per chain
  Vec<Real> start;             // what the accumulators start from
  PrefetchLines read;          // lines that are read soon
  PrefetchLines write;         // lines that are written soon
  int64_t vectors = 1;         // channel vectors; more than one only if pixels are read in place
  int64_t vector_weights = 0;  // weights from channel vector to channel vector
  int64_t vector_bytes = 0;    // bytes of a channel vector in memory, for prefetching
  int64_t last_channel = 0;    // where the last channel vector begins: it may overlap the one before
};

template <class Input>
CMF_INLINE const Input& load_input(const Input& input, int64_t) {
  return input;
}
template <class S>
CMF_INLINE Vec<typename S::Real> load_input(const S* const& pixel, int64_t channel) {
  return S::load(pixel + channel);
}

// A strip's position among its tap rows. The lines that it prefetches are spread over them: a burst of misses would
// fill the queues and stall.
template <class Real, class Input, class Weight>
struct TapRows {
  const Strip<Real, Input, Weight>& strip;
  const Input* input = strip.first;
  const Weight* weight = strip.weight;
  int64_t channel = 0;     // where the channel vector begins
  int64_t first_byte = 0;  // the same in memory
  int64_t done = 0;        // tap rows

  CMF_INLINE void start_vector(int64_t v) {
    input = strip.first;
    weight = strip.weight + v * strip.vector_weights;
    channel = min(v * kLanes<Real>, strip.last_channel);
    first_byte = v * strip.vector_bytes;
    done = 0;
  }

  CMF_INLINE auto load(const Input* from) const { return load_input(*from, channel); }

  CMF_INLINE void next() {
    input += strip.pitch;
    if (input >= strip.ring_end) input = strip.ring_begin;
    weight += strip.weight_pitch;
    prefetch<0>(strip.read);
    prefetch<1>(strip.write);
    ++done;
  }

 private:
  template <int kWrite>
  CMF_INLINE void prefetch(const PrefetchLines& lines) const {
    if (first_byte % kCacheLine) return;  // the channel vector before has the same line
    for (int64_t l = done; l < lines.count; l += strip.tap_rows)
      __builtin_prefetch(lines.first + first_byte + l * lines.step, kWrite, 2);
  }
};

// acc[c] += input[c + t] * weight[t] for kTaps taps of a row, from `tap` on.
template <int kTaps, class Real, class Input, class Weight, int kColumns>
CMF_INLINE void add_taps(const TapRows<Real, Input, Weight>& at, int64_t tap, Vec<Real> (&acc)[kColumns]) {
  Weight w[kTaps];
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) w[t] = at.weight[tap + t];
#pragma GCC unroll 32
  for (int i = 0; i < kColumns + kTaps - 1; ++i) {
    const auto in = at.load(at.input + tap + i);
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t)
      if (i >= t && i - t < kColumns) acc[i - t] = multiply_add(acc[i - t], in, w[t]);
  }
}

// The same for `taps` taps, at most kMaxTaps.
template <class Real, class Input, class Weight, int kColumns, int... kTaps>
CMF_INLINE void add_tap_block(int64_t taps, const TapRows<Real, Input, Weight>& at, int64_t tap,
                              Vec<Real> (&acc)[kColumns], std::integer_sequence<int, kTaps...>) {
  (void)((taps == kTaps + 1 && (add_taps<kTaps + 1>(at, tap, acc), true)) || ...);
}

// acc[c] += input[c + t] * weight[t] for `rows` rows of kTaps taps. Software pipelining across tap rows: at the end of
// a row fewer and fewer taps have an accumulator to go to, and at the start of a row few have. The drain of a row
// overlaps the fill of the next one, so that between rows at least kTaps independent multiply-adds are in flight.
template <int kTaps, class Real, class Input, class Weight, int kColumns>
CMF_INLINE void add_rows(TapRows<Real, Input, Weight>& at, int64_t rows, Vec<Real> (&acc)[kColumns]) {
  static_assert(kColumns >= kTaps - 1, "else an accumulator would get the next row's products before this one's");
  const auto add = [&](int i, const auto& in, const Weight& weight, int t)
                       CMF_INLINE_LAMBDA { acc[i - t] = multiply_add(acc[i - t], in, weight); };
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
      const auto last = at.load(end + i);
      const auto in = at.load(at.input + i);
#pragma GCC unroll 16
      for (int t = i + 1; t < kTaps; ++t) add(kColumns + i, last, w[t], t);
      w[i] = at.weight[i];
#pragma GCC unroll 16
      for (int t = 0; t <= i; ++t) add(i, in, w[t], t);
    }
    w[kTaps - 1] = at.weight[kTaps - 1];
  }
}

// Whether a chain sums a segment of a tap row, and not several rows.
constexpr bool is_long(int64_t taps) { return taps > kTapsPerChain / 2; }

// The tap rows of a chain.
inline int64_t chain_rows(int64_t tap_rows, int64_t taps) {
  const int64_t chains = ceil_div(tap_rows * taps, kTapsPerChain);
  return is_long(taps) ? 1 : chains == 1 ? tap_rows : ceil_div(tap_rows, chains);
}

// The strip's outputs, channel vector by channel vector. kTaps is the length of a tap row that is held as a whole, and
// 0 for any other.
template <class Real, class Input, class Weight, int kColumns, int kTaps>
void convolve_strip(const Strip<Real, Input, Weight>& strip, Vec<Real>* out) {
  const int64_t taps = kTaps > 0 ? kTaps : strip.taps;
  const int64_t block = strip.tap_block;
  const int64_t segment = is_long(taps) ? block * max(1, kTapsPerChain / 2 / block) : taps;
  TapRows<Real, Input, Weight> at{strip};
  for (int64_t v = 0; v < strip.vectors; ++v, out += kColumns) {
    at.start_vector(v);
    bool is_first = true;
    for (int64_t left = strip.tap_rows, tap = 0; left > 0;) {
      const int64_t rows = min(strip.chain_rows, left);
      const int64_t end = min(taps, tap + segment);
      Vec<Real> acc[kColumns];
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) acc[c] = is_first ? strip.start : Vec<Real>{};
      if constexpr (kTaps > 0 && kColumns >= kTaps - 1) {
        add_rows<kTaps>(at, rows, acc);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t t = tap; t < end; t += block)
            add_tap_block(min(block, end - t), at, t, acc, std::make_integer_sequence<int, kMaxTaps>());
          if (end == taps) at.next();
        }
      }
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) out[c] = is_first ? acc[c] : out[c] + acc[c];
      is_first = false;
      tap = end < taps ? end : 0;
      if (tap == 0) left -= rows;
    }
  }
}

// The instantiations of convolve_strip, numbered: for each number of columns one for any length of the tap rows, unless
// pixels are read in place, and one for each usual length.
struct StripVariants {
  int first_kind;  // kind 0 stands for any length of the tap rows, kind k for a length of 2 k + 1
  int kinds;

  struct Variant {
    int columns;
    int taps;  // 0: any
  };
  constexpr int count() const { return kMaxColumns * kinds; }
  // Strips are never longer than most_columns(): there the instantiation for as many columns as that fills the table.
  constexpr Variant operator[](int index) const {
    const int kind = first_kind + index % kinds;
    const int taps = kind > 0 ? 2 * kind + 1 : 0;
    return {int(min(index / kinds + 1, most_columns(taps))), taps};
  }
  constexpr int64_t index_of(int64_t columns, int64_t taps) const {
    const int64_t kind = is_held_as_a_whole(taps) ? taps / 2 : 0;
    return (columns - 1) * kinds + kind - first_kind;
  }
};

template <class Input>
constexpr StripVariants kStripVariants = {0, kMaxRowTaps / 2 + 1};
template <class S>
constexpr StripVariants kStripVariants<const S*> = {1, longest_in_place(S::kDType) / 2};

template <class Real, class Input, class Weight, int... kIndex>
CMF_INLINE void convolve_strip(const Strip<Real, Input, Weight>& strip, int64_t columns, Vec<Real>* out,
                               std::integer_sequence<int, kIndex...>) {
  static constexpr StripVariants kVariants = kStripVariants<Input>;
  static constexpr void (*kConvolve[])(const Strip<Real, Input, Weight>&, Vec<Real>*) = {
      convolve_strip<Real, Input, Weight, kVariants[kIndex].columns, kVariants[kIndex].taps>...};
  kConvolve[kVariants.index_of(columns, strip.taps)](strip, out);
}

// At most most_columns() outputs of each channel vector, one channel vector's after the other's.
template <class Real, class Input, class Weight>
CMF_INLINE void convolve_strip(const Strip<Real, Input, Weight>& strip, int64_t columns, Vec<Real>* out) {
  convolve_strip(strip, columns, out, std::make_integer_sequence<int, kStripVariants<Input>.count()>());
}

// How rows of outputs are computed: cut into strips of nearly the same length, with tap rows in blocks and chains.
// Planning divides, which takes as long as many multiply-adds: it is done once per band, not per strip.
struct RowPlan {
  int64_t strips;
  int64_t length;  // columns of a strip
  int64_t longer;  // strips, the first ones, that are longer by a column
  int64_t taps;
  int64_t tap_block;
  int64_t kernel_rows;        // tap rows where none is outside the map
  int64_t kernel_chain_rows;  // tap rows per chain there

  RowPlan() = default;
  RowPlan(int64_t columns, int64_t kernel_rows, int64_t taps)
      : strips(ceil_div(columns, most_columns(taps))),
        length(columns / strips),
        longer(columns % strips),
        taps(taps),
        tap_block(equal_share(taps, kMaxTaps)),
        kernel_rows(kernel_rows),
        kernel_chain_rows(chain_rows(kernel_rows, taps)) {}

  // Sets what a strip of so many tap rows takes from the plan.
  template <class Strip>
  CMF_INLINE void apply_to(Strip& strip, int64_t tap_rows) const {
    strip.tap_rows = tap_rows;
    strip.taps = taps;
    strip.tap_block = tap_block;
    strip.chain_rows = tap_rows == kernel_rows ? kernel_chain_rows : chain_rows(tap_rows, taps);
  }

  // Calls f(first column, columns) for each strip.
  template <class F>
  CMF_INLINE void for_each_strip(F f) const {
    for (int64_t strip = 0, first = 0; strip < strips; ++strip) {
      const int64_t columns = length + (strip < longer);
      f(first, columns);
      first += columns;
    }
  }
};

// The outputs of a row, strip by strip; moves `strip` along.
template <class Real, class Input, class Weight>
void convolve_row(Strip<Real, Input, Weight>& strip, const RowPlan& plan, Vec<Real>* out) {
  plan.for_each_strip([&](int64_t first, int64_t columns) {
    convolve_strip(strip, columns, out + first);
    strip.first += columns;
    strip.ring_begin += columns;
    strip.ring_end += columns;
    strip.read.first += columns * strip.read.column;
    strip.write.first += columns * strip.write.column;
  });
}

}  // namespace
}  // namespace convmixer_fast::cpu
