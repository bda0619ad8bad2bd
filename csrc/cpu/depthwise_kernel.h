// The CPU kernels, one source for every instruction set. Each depthwise_<isa>.cpp has its target pragma, says what it
// brings in macros of ours (GCC 12 sets none of its own for a pragma in C++) and includes this file once, through
// entry_points.h. Vectors are the compiler's (GCC, Clang), so the code below is plain arithmetic. Everything has
// internal linkage and no function of the standard library is
// instantiated: nothing compiled for a wide instruction set can be linked into the path of a narrower one.
//
// A vector holds neighbouring channels of one pixel, whatever the layout of x: only `load_pixels` and `store_pixels`
// know strides. A task is (image, block of channels, band of rows, band of columns). It slides down its band: `pack`
// turns the next input rows into zero-padded rows of vectors in a ring, `convolve` sums the taps, `emit` applies the
// epilogue and stores. Small kernels on channels_last maps, where packing would take longer than the sums, find in the
// ring where the pixels lie instead, and read them there.
#pragma once
#include <math.h>
#include <string.h>

#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(CMF_F16C)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "scratch.h"

#define CMF_INLINE inline __attribute__((always_inline))
#define CMF_INLINE_LAMBDA __attribute__((always_inline))

namespace convmixer_fast::cpu {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The size of a share where n things are cut into as few as there can be of at most `most` each, all about as large. A
// division takes as long as dozens of multiply-adds; most n need none.
constexpr int64_t equal_share(int64_t n, int64_t most) { return n <= most ? n : ceil_div(n, ceil_div(n, most)); }

// ---------------------------------------------------------------------------------------------------- vectors

template <class T, int64_t kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class Real>
constexpr int kLanes = CMF_VECTOR_BYTES / sizeof(Real);
template <class Real>
using Vec = typename VectorOf<Real, CMF_VECTOR_BYTES>::type;
using Bits = Vec<int32_t>;
using Bits16 = VectorOf<uint16_t, CMF_VECTOR_BYTES / 2>::type;

template <class To, class From>
CMF_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A storage type names the Real it computes in, and turns memory into vectors and back (to nearest even).
template <class T>
struct Native {
  using Real = T;
  static constexpr DType kDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  T value;
  static CMF_INLINE Vec<T> load(const Native* from) {
    Vec<T> v;
    memcpy(&v, from, sizeof v);
    return v;
  }
  static CMF_INLINE void store(Native* to, Vec<T> v) { memcpy(to, &v, sizeof v); }
  static CMF_INLINE Vec<T> round(Vec<T> v) { return v; }
};

CMF_INLINE Bits load_bits16(const void* from) {
  Bits16 v;
  memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Bits);
}

CMF_INLINE void store_bits16(void* to, Bits v) {
  const Bits16 narrow = __builtin_convertvector(v, Bits16);
  memcpy(to, &narrow, sizeof narrow);
}

struct BFloat16 {
  using Real = float;
  static constexpr DType kDType = DType::kBFloat16;
  uint16_t value;
  static CMF_INLINE Bits narrow(Vec<float> v) {  // in the upper halves
    const Bits bits = bit_cast<Bits>(v);
    const Bits nearest = bits + (0x7fff + (bits >> 16 & 1));
    return (v == v ? nearest : bits | 0x400000) & int32_t(0xffff0000);
  }
  static CMF_INLINE Vec<float> load(const BFloat16* from) { return bit_cast<Vec<float>>(load_bits16(from) << 16); }
  static CMF_INLINE void store(BFloat16* to, Vec<float> v) { store_bits16(to, narrow(v) >> 16); }
  static CMF_INLINE Vec<float> round(Vec<float> v) { return bit_cast<Vec<float>>(narrow(v)); }
};

struct Float16 {
  using Real = float;
  static constexpr DType kDType = DType::kFloat16;
  uint16_t value;
#if defined(CMF_F16C) && CMF_VECTOR_BYTES == 64
  static CMF_INLINE Bits16 narrow(Vec<float> v) {  // (the forms without a mask make GCC 12 warn)
    return bit_cast<Bits16>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), 0));
  }
  static CMF_INLINE Vec<float> widen(Bits16 v) {
    return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v)));
  }
#elif defined(CMF_F16C)
  static CMF_INLINE Bits16 narrow(Vec<float> v) { return bit_cast<Bits16>(_mm256_cvtps_ph(bit_cast<__m256>(v), 0)); }
  static CMF_INLINE Vec<float> widen(Bits16 v) { return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(v))); }
#else
  static CMF_INLINE Bits16 narrow(Vec<float> v) {
    const Bits bits = bit_cast<Bits>(v), magnitude = bits & 0x7fffffff;
    const Bits normal = magnitude - (112 << 23) + (0xfff + (magnitude >> 13 & 1));  // rebias, to nearest even
    // Adding 0.5 leaves the multiples of 2^-24, the spacing of float16's subnormals, in the last bits.
    const Bits subnormal = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) + 0.5f) - (126 << 23);
    const Bits special = 0x7c00 | ((magnitude > (255 << 23)) & (0x200 | (magnitude >> 13 & 0x3ff)));
    const Bits finite = magnitude < (113 << 23) ? subnormal : normal >> 13;
    const Bits half = magnitude < (143 << 23) ? finite : special;
    return __builtin_convertvector(half | (bits >> 16 & 0x8000), Bits16);
  }
  static CMF_INLINE Vec<float> widen(Bits16 v) {
    const Bits bits = __builtin_convertvector(v, Bits), magnitude = (bits & 0x7fff) << 13;
    const Bits finite = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);  // exact, subnormals too
    const Bits special = magnitude | (255 << 23);
    return bit_cast<Vec<float>>((magnitude < (31 << 23) ? finite : special) | (bits & 0x8000) << 16);
  }
#endif
  static CMF_INLINE Vec<float> load(const Float16* from) {
    Bits16 v;
    memcpy(&v, from, sizeof v);
    return widen(v);
  }
  static CMF_INLINE void store(Float16* to, Vec<float> v) {
    const Bits16 bits = narrow(v);
    memcpy(to, &bits, sizeof bits);
  }
  static CMF_INLINE Vec<float> round(Vec<float> v) { return widen(narrow(v)); }
};

// The transpose of kLanes x kLanes values, in log2 kLanes exchanges of ever smaller blocks.
template <int kBlock, class V, size_t... kLane>
CMF_INLINE void exchange_blocks(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr int n = sizeof...(kLane);
  const V low = a, high = b;
#if defined(__clang__)
  a = __builtin_shufflevector(low, high, (kLane & kBlock ? kLane - kBlock + n : kLane)...);
  b = __builtin_shufflevector(low, high, (kLane & kBlock ? kLane + n : kLane + kBlock)...);
#else
  using Index = decltype(a < b);
  a = __builtin_shuffle(low, high, Index{(kLane & kBlock ? kLane - kBlock + n : kLane)...});
  b = __builtin_shuffle(low, high, Index{(kLane & kBlock ? kLane + n : kLane + kBlock)...});
#endif
}

template <int kBlock, class V, size_t n>
CMF_INLINE void transpose(V (&v)[n]) {
  if constexpr (kBlock > 0) {
#pragma GCC unroll 16
    for (size_t i = 0; i < n; ++i)
      if (!(i & kBlock)) exchange_blocks<kBlock>(v[i], v[i + kBlock], std::make_index_sequence<n>());
    transpose<kBlock / 2>(v);
  }
}

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

// ---------------------------------------------------------------------------------------------------- pointwise

// The lesser and the greater, or b where one is NaN: each an instruction, which GCC does not see in a ? b : c.
CMF_INLINE Vec<float> lesser(Vec<float> a, Vec<float> b) {
#if defined(CMF_F16C) && CMF_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(CMF_F16C)
  return bit_cast<Vec<float>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}
CMF_INLINE Vec<float> greater(Vec<float> a, Vec<float> b) {
#if defined(CMF_F16C) && CMF_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(CMF_F16C)
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// gelu(x) = max(x, 0) - t Phi(-t), t = |x|: no cancellation. log2(2 Phi(-t)) is close to a parabola without a constant
// and a polynomial here, as is 2^f.
template <int kLog2, int kExp2>
struct GeluPolynomials {
  float log2[kLog2], exp2[kExp2];  // 2^f is halved by the exponent
};
// Together they are off by 1.1e-7 Phi(-t) for t < 0.75, by 1.9e-8 / t beyond.
constexpr GeluPolynomials<10, 6> kGelu = {{4.190667317218388e-07f, -8.221937960584197e-06f, 6.719936871101976e-05f,
                                           -0.00026057253440669136f, -2.6314870177938595e-05f, 0.006972101349101637f,
                                           -0.052456833008752334f, -0.45921580372912024f, -1.1511047538621313f, 0.f},
                                          {0.0013264727391703653f, 0.009671512917326526f, 0.05550733745336358f,
                                           0.24022242081104875f, 0.6931469775964698f, 1.f}};

// value = the polynomial with these terms, from the highest power down, at x.
template <int kTerms, int kCount>
CMF_INLINE void evaluate(const float (&terms)[kTerms], const Vec<float> (&x)[kCount], Vec<float> (&value)[kCount]) {
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) value[c] = terms[0] + Vec<float>{};
#pragma GCC unroll 16
  for (int i = 1; i < kTerms; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) value[c] = value[c] * x[c] + terms[i];
}

// x = gelu(x), for kCount vectors in step: one by one, each would wait for the last term of its own polynomials.
template <int kCount, int kLog2, int kExp2>
CMF_INLINE void gelu(Vec<float> (&x)[kCount], const GeluPolynomials<kLog2, kExp2>& polynomials) {
  constexpr float kRound = 0x1.8p23f - 1;  // added, it leaves the nearest integer, less 1, in the last bits
  Vec<float> t[kCount], log2[kCount], exponent[kCount], phi[kCount];
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) {
    const Vec<float> magnitude = bit_cast<Vec<float>>(bit_cast<Bits>(x[c]) & 0x7fffffff);
    t[c] = lesser(magnitude, 8 + Vec<float>{});  // t Phi(-t) is 3e-14 there
  }
  evaluate(polynomials.log2, t, log2);
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) {
    exponent[c] = log2[c] + kRound;
    log2[c] -= exponent[c] - kRound;  // the rest, at most a half
  }
  evaluate(polynomials.exp2, log2, phi);
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) {
    phi[c] = bit_cast<Vec<float>>(bit_cast<Bits>(phi[c]) + (bit_cast<Bits>(exponent[c]) << 23));
    x[c] = greater(Vec<float>{}, x[c]) - t[c] * phi[c];
  }
}

template <int kCount>
CMF_INLINE void gelu(Vec<float> (&x)[kCount]) {
  gelu(x, kGelu);
}

template <int kCount>
CMF_INLINE void gelu(Vec<double> (&x)[kCount]) {
  for (int c = 0; c < kCount; ++c)
    for (int i = 0; i < kLanes<double>; ++i) x[c][i] *= 0.5 * erfc(x[c][i] * -M_SQRT1_2);
}

// PointwiseParams of one channel vector.
template <class Real>
struct Pointwise {
  Vec<Real> bias, scale, shift;
  Activation activation;

  static constexpr int kInStep = CMF_VECTOR_REGISTERS == 32 ? 8 : 4;  // vectors, enough to hide the latency

  // emit(i, the result for v[i]), for each i in turn.
  template <class F>
  CMF_INLINE void apply(const Vec<Real>* v, int64_t n, F emit) const {
    switch (activation) {
      case Activation::kGelu: apply_in_step(v, n, [](auto& z) CMF_INLINE_LAMBDA { gelu(z); }, emit); break;
      case Activation::kRelu:
        for (int64_t i = 0; i < n; ++i) {
          const Vec<Real> biased = v[i] + bias;
          emit(i, (biased < 0 ? Vec<Real>{} : biased) * scale + shift);
        }
        break;
      case Activation::kNone:
        for (int64_t i = 0; i < n; ++i) emit(i, (v[i] + bias) * scale + shift);
    }
  }

  CMF_INLINE void apply(Vec<Real>* v, int64_t n) const {
    apply(v, n, [v](int64_t i, Vec<Real> result) { v[i] = result; });
  }

  // The same, where `activate` changes an array of at most kInStep vectors; the last two are of about equal length.
  template <class Activate, class F>
  CMF_INLINE void apply_in_step(const Vec<Real>* v, int64_t n, Activate activate, F emit) const {
    for (int64_t i = 0, count; i < n; i += count) {
      const int64_t rest = n - i;
      count = rest >= 2 * kInStep ? kInStep : rest > kInStep ? (rest + 1) / 2 : rest;
      apply_to(v, i, count, activate, emit, std::make_integer_sequence<int, kInStep>());
    }
  }

 private:
  template <class Activate, class F, int... kCount>
  CMF_INLINE void apply_to(const Vec<Real>* v, int64_t i, int64_t count, Activate activate, F& emit,
                           std::integer_sequence<int, kCount...>) const {
    (void)((count == kCount + 1 && (apply_to<kCount + 1>(v, i, activate, emit), true)) || ...);
  }

  template <int kCount, class Activate, class F>
  CMF_INLINE void apply_to(const Vec<Real>* v, int64_t i, Activate activate, F& emit) const {
    Vec<Real> z[kCount];
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) z[c] = v[i + c] + bias;
    activate(z);
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) emit(i + c, z[c] * scale + shift);
  }
};

template <class V>
void reverse(V* v, int64_t n) {
  for (int64_t i = 0; i < n / 2; ++i) {
    const V first = v[i];
    v[i] = v[n - 1 - i];
    v[n - 1 - i] = first;
  }
}

template <class S, class Real = typename S::Real>
Vec<Real> load_vector(const void* from, bool is_storage, int64_t channel, int64_t channels, Real otherwise) {
  Vec<Real> v = otherwise + Vec<Real>{};
  if (from && is_storage) {
    load_pixels(static_cast<const S*>(from) + channel, 1, 0, channels, 1, &v);
  } else if (from) {
    load_pixels(static_cast<const Native<Real>*>(from) + channel, 1, 0, channels, 1, &v);
  }
  return v;
}

template <class S, class Real = typename S::Real>
Pointwise<Real> load_pointwise(const PointwiseParams& p, DType dtype, int64_t channel, int64_t channels) {
  const bool is_storage = p.vector_dtype == dtype;
  return {load_vector<S>(p.bias, is_storage, channel, channels, Real(0)),
          load_vector<S>(p.scale, is_storage, channel, channels, Real(1)),
          load_vector<S>(p.shift, is_storage, channel, channels, Real(0)), p.activation};
}

// ---------------------------------------------------------------------------------------------------- depthwise

#if CMF_VECTOR_REGISTERS == 32  // 16 sums, 9 weights, the input
constexpr int kMaxColumns = 16, kMaxTaps = 9;
#else  // 16
constexpr int kMaxColumns = 8, kMaxTaps = 5;
#endif
constexpr int kUsualTaps = kMaxTaps / 2 + 1;  // 3, 5 and so on, and all others together
constexpr int64_t kFewTaps = 4;               // up to so many, the sums start from the bias
constexpr int64_t kTapsAtOnce = 45;  // are summed before they are added to the rest: more accurate than one long sum

// The longest rows of taps for which pixels are read in place, rather than packed: where it is faster (measured on
// Emerald Rapids). 16-bit values are widened anew for each row of taps, while packing does it once.
#if defined(CMF_F16C)
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

template <class V>
struct CompensatedSum {
  V sum = {};
  V lost = {};  // what the additions to `sum` rounded away; NaN once `sum` is infinite

  CMF_INLINE void add(V v) {
    const V total = sum + v, kept = total - sum;
    lost += (sum - (total - kept)) + (v - kept);
    sum = total;
  }
  CMF_INLINE void add(const CompensatedSum& other) {
    add(other.sum);
    lost += other.lost;
  }
  CMF_INLINE V value() const { return lost == lost ? sum + lost : sum; }
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

template <class V>
CMF_INLINE V multiply_add(V sum, V a, V b) {
  return sum + a * b;
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

// How a depthwise convolution is cut into tasks, and a task into steps. Depends on nothing but the parameters.
template <class Real>
struct Plan {
  static constexpr int64_t kChannels = 64;             // of a block, at most: 256 bytes of float32 at a time
  static constexpr int64_t kChannelsInPlace = 256;     // the same, of pixels read in place: sums that fit the L1 cache
  static constexpr int64_t kScratchBytes = 512 << 10;  // of the ring: half of a usual L2 cache
  static constexpr int64_t kPixels = 128;              // at least so many in a step, or in a band
  static constexpr int64_t kTasks = 64;                // wanted, for the threads to share
  static constexpr int64_t kGroupPixels = 1024;        // of the images that use a block's weights one after another

  bool in_place = false;            // whether pixels are read where they lie
  int64_t first_tap = 0, taps = 0;  // the kernel's columns that meet the map at all
  bool few_taps = false;
  int64_t band_width = 0, width_bands = 0, pitch = 0;
  int64_t step_rows = 0, ring_rows = 0;
  int64_t vectors = 0, blocks = 0;
  int64_t block_channels = 0;  // in every block but the last, which has the rest
  int64_t band_height = 0, height_bands = 0;
  int64_t images = 0;  // that run through a block before the next block's turn
  int64_t tasks = 0;

  explicit Plan(const DepthwiseParams& p) {
    constexpr int64_t n = kLanes<Real>;
    if (p.batch == 0 || p.channels == 0 || p.height == 0 || p.width == 0) return;
    first_tap = max(0, p.pad_left - p.width + 1);
    taps = min(p.kernel_w, p.pad_left + p.width) - first_tap;
    few_taps = min(p.kernel_h, p.height) * min(taps, p.width) <= kFewTaps;
    in_place = !p.has_prologue && p.x_stride.c == 1 && p.y_stride.c == 1 && p.channels >= n && !few_taps &&
               taps % 2 == 1 && taps > 1 && taps <= longest_in_place(p.dtype);
    width_bands = ceil_div(p.width, 128);
    band_width = ceil_div(p.width, width_bands);
    width_bands = ceil_div(p.width, band_width);
    pitch = band_width + taps - 1;
    const int64_t least_rows = min(p.height, ceil_div(kPixels, band_width));
    step_rows = in_place ? 1 : least_rows;
    ring_rows = min(p.height, step_rows + p.kernel_h - 1);
    const int64_t fitting = max(1, kScratchBytes / (ring_rows * pitch * CMF_VECTOR_BYTES));
    if (in_place) {  // channels that fill no vector join the last block, whose last vector overlaps the one before
      vectors = equal_share(p.channels / n, min(kChannelsInPlace / n, fitting));
      blocks = ceil_div(p.channels / n, vectors);
      block_channels = vectors * n;
      vectors += p.channels % n > 0;
    } else {
      vectors = min(kChannels / n, min(fitting, ceil_div(p.channels, n)));
      blocks = ceil_div(p.channels, vectors * n);
      block_channels = vectors * n;
    }
    const int64_t wanted = ceil_div(kTasks, p.batch * blocks * width_bands);
    band_height = max(least_rows, ceil_div(p.height, wanted));
    height_bands = ceil_div(p.height, band_height);
    images = min(p.batch, ceil_div(kGroupPixels, p.height * p.width));
    tasks = p.batch * blocks * height_bands * width_bands;
  }

  // Vectors of memory.
  int64_t ring() const {
    return in_place ? ceil_div(ring_rows * pitch * sizeof(void*), CMF_VECTOR_BYTES) : vectors * ring_rows * pitch;
  }
  int64_t sums() const { return in_place ? vectors * kMaxColumns : step_rows * band_width; }
};

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

template <class S>
class Depthwise {
  using Real = typename S::Real;
  using V = Vec<Real>;
  static constexpr int kLanes = cpu::kLanes<Real>;

 public:
  Depthwise(const DepthwiseParams& p, Scratch& scratch) : p_(p), plan_(p) {
    const int64_t weights = plan_.vectors * p_.kernel_h * p_.kernel_w;
    const int64_t vectors = weights + plan_.ring() + plan_.sums() + 2 * plan_.vectors;
    constexpr int64_t kPointwise = sizeof(Pointwise<Real>);
    void* memory = scratch.reserve(vectors * sizeof(V) + 2 * plan_.vectors * kPointwise);
    weight_ = static_cast<V*>(memory);
    tile_ = weight_ + weights;
    places_ = reinterpret_cast<const S**>(tile_);
    sum_ = tile_ + plan_.ring();
    start_ = sum_ + plan_.sums();
    zeros_ = start_ + plan_.vectors;
    for (int64_t v = 0; v < plan_.vectors; ++v) zeros_[v] = V{};
    prologue_ = reinterpret_cast<Pointwise<Real>*>(zeros_ + plan_.vectors);
    epilogue_ = prologue_ + plan_.vectors;
  }

  void run(int64_t begin, int64_t end) {
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      // (group of images, block, image of the group, band of rows, band of columns), the last one fastest
      const int64_t bands = plan_.height_bands * plan_.width_bands;
      const int64_t group = task / (plan_.images * plan_.blocks * bands) * plan_.images;
      const int64_t images = min(plan_.images, p_.batch - group);
      const int64_t rest = task - group * plan_.blocks * bands;
      const int64_t block = rest / (images * bands);
      image_ = group + rest / bands % images;
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
  V* tile_row(int64_t vector, int64_t row) const {
    return tile_ + (vector * plan_.ring_rows + row % plan_.ring_rows) * plan_.pitch;
  }
  const S** places_of(int64_t row) const { return places_ + row % plan_.ring_rows * plan_.pitch; }

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
      prologue_[v] = load_pointwise<S>(p_.prologue, p_.dtype, channel, channels_of(v));
      epilogue_[v] = load_pointwise<S>(p_.epilogue, p_.dtype, channel, channels_of(v));
      // Few taps: the sums start from the bias, which saves a rounding. Many: it would enlarge every partial sum.
      start_[v] = plan_.few_taps ? epilogue_[v].bias : V{};
      if (plan_.few_taps) epilogue_[v].bias = V{};
    }
  }

  // Outputs [h_begin, h_end) x [w_begin, w_end) of the image and the block.
  void run_band(int64_t h_begin, int64_t h_end, int64_t w_begin, int64_t w_end) {
    w_begin_ = w_begin;
    columns_ = w_end - w_begin;
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
          const Lines read = lines(p_.x, p_.x_stride, v, packed + r), write = lines(p_.y, p_.y_stride, v, h + r);
          convolve(v, h + r, sum_ + r * columns_, read, write);
        }
        emit(v, h, rows);
      }
    }
  }

  // Where the pixels of a row lie; beside the map it is where there are zeros.
  void locate(int64_t row) {
    const S** to = places_of(row);
    const int64_t first = max(0, -origin_), last = min(columns_ + plan_.taps - 1, p_.width - origin_);
    const S* from = place_of(p_.x, p_.x_stride, row, origin_ + first);
    const S* const zeros = reinterpret_cast<const S*>(zeros_);
    for (int64_t i = 0; i < first; ++i) to[i] = zeros;
    for (int64_t i = first; i < last; ++i) to[i] = from + (i - first) * p_.x_stride.w;
    for (int64_t i = last; i < columns_ + plan_.taps - 1; ++i) to[i] = zeros;
  }

  template <class T>
  auto place_of(T* tensor, const Strides& stride, int64_t h, int64_t w) const {
    using Element = std::conditional_t<std::is_const_v<T>, const S, S>;
    return static_cast<Element*>(tensor) + image_ * stride.n + channel_ * stride.c + h * stride.h + w * stride.w;
  }

  // Strip by strip, each with all channels of the block: what lies together is read and written together.
  void run_row_in_place(int64_t h) const {
    const int64_t top = h - p_.pad_top, first = max(0, top), last = min(p_.height, top + p_.kernel_h);
    Strip<Real, const S*, V> strip = {};
    strip.pitch = plan_.pitch;
    strip.weight = weight_ + (first - top) * p_.kernel_w + plan_.first_tap;
    strip.weight_pitch = p_.kernel_w;
    strip.tap_rows = last - first;
    strip.taps = plan_.taps;
    strip.vectors = ceil_div(channels_, kLanes);
    strip.vector_weights = p_.kernel_h * p_.kernel_w;
    strip.vector_bytes = kLanes * sizeof(S);
    strip.last_channel = channels_ - kLanes;
    for_strips(columns_, [&](int64_t column, int64_t length) {
      strip.first = places_of(first) + column;
      strip.ring_begin = places_ + column;
      strip.ring_end = strip.ring_begin + plan_.ring_rows * plan_.pitch;
      strip.read = pixel_lines(p_.x, p_.x_stride, top + p_.kernel_h, column, length);
      strip.write = pixel_lines(p_.y, p_.y_stride, h + 1, column, length);
      convolve_strip(strip, length, sum_);
      const S* const* z = places_of(h) + w_begin_ - origin_ + column;
      for (int64_t v = 0; v < strip.vectors; ++v) emit_in_place(v, sum_ + v * length, length, z, h, w_begin_ + column);
    });
  }

  // Those of the first channel vector of a strip's pixels; of the map's rows only.
  Lines pixel_lines(const void* tensor, const Strides& stride, int64_t h, int64_t column, int64_t columns) const {
    const char* first = reinterpret_cast<const char*>(place_of(tensor, stride, h, w_begin_ + column));
    return {first, stride.w * int64_t(sizeof(S)), h < p_.height ? columns : 0, 0};
  }

  // The epilogue and the residual of one channel vector's strip, to memory; z: where the strip's inputs lie.
  void emit_in_place(int64_t v, const V* sums, int64_t columns, const S* const* z, int64_t h, int64_t w) const {
    const Pointwise<Real> after = epilogue_[v];  // a copy, which no store can change
    const int64_t channel = offset_of(v), step = p_.y_stride.w;
    S* to = place_of(p_.y, p_.y_stride, h, w) + channel;
    const bool adds = p_.residual;
    after.apply(sums, columns, [=](int64_t i, V sum) CMF_INLINE_LAMBDA {
      S::store(to + i * step, adds ? sum + S::load(z[i] + channel) : sum);
    });
  }

  void pack(int64_t begin, int64_t end) {
    const S* x = static_cast<const S*>(p_.x) + image_ * p_.x_stride.n + channel_ * p_.x_stride.c;
    const RingColumns columns{origin_, columns_ + plan_.taps - 1, plan_.pitch};
    pack_ring(
        x, p_.x_stride, p_.width, channels_, begin, end, columns,
        [&](int64_t v, int64_t row) { return tile_row(v, row); },
        [&](int64_t v, V* z, int64_t n) {
          if (!p_.has_prologue) return;
          prologue_[v].apply(z, n);
          for (int64_t i = 0; i < n; ++i) z[i] = S::round(z[i]);
        });
  }

  // Those of a row that one channel vector's strip will touch; of the map's rows only.
  Lines lines(const void* tensor, const Strides& stride, int64_t v, int64_t h) const {
    const int64_t offset = image_ * stride.n + (channel_ + v * kLanes) * stride.c + h * stride.h + w_begin_ * stride.w;
    const char* first = reinterpret_cast<const char*>(static_cast<const S*>(tensor) + offset);
    constexpr int64_t kSize = sizeof(S);
    if (h >= p_.height) return {first, 0, 0, 0};
    if (stride.c == 1) return {first, stride.w * kSize, v * kLanes * kSize % 64 ? 0 : kMaxColumns, stride.w * kSize};
    return {first, stride.c * kSize, kLanes, stride.w * kSize};
  }

  // The sums of row h; tap rows outside the map are left out.
  void convolve(int64_t v, int64_t h, V* out, const Lines& read, const Lines& write) const {
    const int64_t top = h - p_.pad_top, first = max(0, top), last = min(p_.height, top + p_.kernel_h);
    Strip<Real> strip;
    strip.first = tile_row(v, first);
    strip.ring_begin = tile_row(v, 0);
    strip.ring_end = strip.ring_begin + plan_.ring_rows * plan_.pitch;
    strip.pitch = plan_.pitch;
    strip.weight = weight_ + (v * p_.kernel_h + first - top) * p_.kernel_w + plan_.first_tap;
    strip.weight_pitch = p_.kernel_w;
    strip.tap_rows = last - first;
    strip.taps = plan_.taps;
    strip.start = start_[v];
    strip.read = read;
    strip.write = write;
    convolve_row(strip, columns_, out);
  }

  // The epilogue and the residual of rows [h, h + rows), to memory.
  void emit(int64_t v, int64_t h, int64_t rows) const {
    const Strides& stride = p_.y_stride;
    const bool joined = columns_ == p_.width && stride.h == p_.width * stride.w;
    S* y = static_cast<S*>(p_.y) + image_ * stride.n + (channel_ + v * kLanes) * stride.c;
    for_pixel_groups<kLanes>(rows, columns_, joined, [&](int64_t row, int64_t column, int64_t n) {
      V* sum = sum_ + row * columns_ + column;
      epilogue_[v].apply(sum, n);
      if (p_.residual) {
        int64_t r = row, c = column;
        const V* z = tile_row(v, h + r) + w_begin_ - origin_;
        for (int64_t i = 0; i < n; ++i) {
          sum[i] += z[c];
          if (++c == columns_) c = 0, z = tile_row(v, h + ++r) + w_begin_ - origin_;
        }
      }
      S* to = y + (h + row) * stride.h + (w_begin_ + column) * stride.w;
      store_pixels(to, stride.c, stride.w, channels_of(v), n, sum);
    });
  }

  const DepthwiseParams& p_;
  const Plan<Real> plan_;
  V *weight_, *tile_, *sum_, *start_, *zeros_;
  const S** places_;  // the ring, of pixels read in place
  Pointwise<Real>* prologue_;
  Pointwise<Real>* epilogue_;
  int64_t channel_, channels_;  // of the block
  int64_t image_;
  int64_t w_begin_, columns_;  // of the band
  int64_t origin_;             // the map's column in the tile's column 0
};

// ---------------------------------------------------------------------------------------------------- pooling

template <class Real>
int64_t pool_tasks(const PoolParams& p) {
  return p.batch * ceil_div(p.channels, kLanes<Real>);
}

template <class S, class Real = typename S::Real>
void pool(const PoolParams& p, int64_t begin, int64_t end) {
  constexpr int n = kLanes<Real>;
  const Strides& stride = p.x_stride;
  const int64_t blocks = ceil_div(p.channels, n);
  const bool joined = stride.h == p.width * stride.w;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / blocks, channel = task % blocks * n, channels = min(n, p.channels - channel);
    const S* x = static_cast<const S*>(p.x) + image * stride.n + channel * stride.c;
    const Pointwise<Real> prologue = load_pointwise<S>(p.prologue, p.dtype, channel, channels);
    CompensatedSum<Vec<Real>> sum;
    if (p.height * p.width > 0)
      for_pixel_groups<n>(p.height, p.width, joined, [&](int64_t row, int64_t column, int64_t pixels) {
        Vec<Real> z[n];
        load_pixels(x + row * stride.h + column * stride.w, stride.c, stride.w, channels, pixels, z);
        prologue.apply(z, pixels);
        for (int64_t i = pixels; i < n; ++i) z[i] = Vec<Real>{};
        for (int half = n / 2; half > 0; half /= 2)
          for (int i = 0; i < half; ++i) z[i] += z[i + half];
        sum.add(z[0]);
      });
    const Vec<Real> mean = sum.value() / Real(p.height * p.width);
    store_pixels(static_cast<S*>(p.y) + image * p.channels + channel, 1, 0, channels, 1, &mean);
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
