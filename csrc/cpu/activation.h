// The elementwise step: activation(v + bias) * scale + shift, one bias, scale and shift per channel. No other file of
// the CPU kernels knows what an activation computes.
//
// Terms: docs/glossary.md.
#pragma once
#include <math.h>

#include <utility>

#include "pixels.h"

namespace convmixer_fast::cpu {
namespace {

// What the results will be rounded to: the type that they are computed in, or bfloat16, for which shorter formulas do.
enum class Precision { kFull, kBFloat16 };

// gelu(x) = max(x, 0) - t Phi(-t), t = |x|: no cancellation. The fourth root of Phi(-t) falls so gently that a
// polynomial follows it, p(t), with fewer multiply-adds than Phi(-t) itself would take, the power included.
//
// The largest t that is looked at: for all beyond, t Phi(-t) is taken to be what it is here, next to nothing.
constexpr float kGeluEnd = 6.2f;
// The terms of p, from the highest power down. p^4 is off by 5.9e-8 Phi(-t) for t < 0.75, by 1.6e-8 / t beyond; t p^4
// is 5e-10 at the end.
constexpr float kGelu[] = {-9.12558117960316e-09f,   2.723073748711613e-07f,   -3.1951828987075714e-06f,
                           1.6408464944106527e-05f,  -1.3811461940349545e-05f, -0.0001460915173172611f,
                           -0.00025661344989202917f, 0.003976836800575256f,    0.004567382391542196f,
                           -0.0501798614859581f,     -0.16773530840873718f,    0.8408964276313782f};
// The same with fewer terms, for results that are rounded to bfloat16. The relative error of t p^4 is 1.1e-4 for t < 3,
// the absolute one 4e-6 beyond; half an ulp of bfloat16 is 2e-3.
constexpr float kShortGelu[] = {8.800777141004801e-05f, -0.0013877468882128596f, 0.006259853020310402f,
                                0.002382861915975809f,  -0.04936705902218819f,   -0.1677357703447342f,
                                0.8408746123313904f};

// value = the polynomial with these terms, from the highest power down, at x. `opaque` keeps the order of the
// multiply-adds: the compiler would finish one vector's polynomial after the other, each a chain of latencies.
template <int kTerms, int kCount>
CMF_INLINE void evaluate(const float (&terms)[kTerms], const Vec<float> (&x)[kCount], Vec<float> (&value)[kCount]) {
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) value[c] = terms[0] + Vec<float>{};
#pragma GCC unroll 16
  for (int i = 1; i < kTerms; ++i) {
    Vec<float> term = terms[i] + Vec<float>{};
    opaque(term);  // stays in a register: loads would be the bottleneck
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) {
      value[c] = value[c] * x[c] + term;
      opaque(value[c]);
    }
  }
}

// x = gelu(x), for kCount vectors interleaved: one by one, each would wait for the last term of its own polynomial.
template <int kCount, int kTerms>
CMF_INLINE void gelu(Vec<float> (&x)[kCount], const float (&polynomial)[kTerms]) {
  Vec<float> t[kCount], p[kCount];
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) {
    const Vec<float> magnitude = bit_cast<Vec<float>>(bit_cast<Bits>(x[c]) & 0x7fffffff);
    t[c] = vector_min(magnitude, kGeluEnd + Vec<float>{});
  }
  evaluate(polynomial, t, p);
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) {
    p[c] *= p[c];
    x[c] = vector_max(Vec<float>{}, x[c]) - t[c] * p[c] * p[c];
  }
}

// Vectors whose GELU is computed at the same time: enough to hide its latency. With 16 registers it is as many as an
// accumulator tile of the network has pixels, though five, all in registers, would take 5 % less each.
constexpr int kGeluVectors = CMF_VECTOR_REGISTERS == 32 ? 8 : 6;

// v[i] = gelu(v[i] + bias) * scale + shift for kCount vectors. Not inline: it wants all vector registers, of which
// callers have none to spare.
template <const auto& kPolynomial, int kCount>
__attribute__((noinline)) void gelu_step(Vec<float>* v, const Vec<float>& bias, const Vec<float>& scale,
                                         const Vec<float>& shift) {
  Vec<float> z[kCount];
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) z[c] = v[c] + bias;
  gelu(z, kPolynomial);
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) v[c] = z[c] * scale + shift;
}

// The elementwise step of one channel vector.
template <class Real>
struct Elementwise {
  Vec<Real> bias, scale, shift;
  Activation activation;

  // Calls store(i, result) for v[i], for each i in turn; overwrites v.
  template <Precision kPrecision = Precision::kFull, class Store>
  CMF_INLINE void apply(Vec<Real>* v, int64_t count, Store store) const {
    const Elementwise step = *this;  // a copy, which no store can change
    switch (activation) {
      case Activation::kGelu:
        apply_gelu<kPrecision>(v, count);
        for (int64_t i = 0; i < count; ++i) store(i, v[i]);
        break;
      case Activation::kRelu:
        for (int64_t i = 0; i < count; ++i) {
          const Vec<Real> biased = v[i] + step.bias;
          store(i, (biased < 0 ? Vec<Real>{} : biased) * step.scale + step.shift);
        }
        break;
      case Activation::kNone:
        for (int64_t i = 0; i < count; ++i) store(i, (v[i] + step.bias) * step.scale + step.shift);
    }
  }

  // Replaces v[i] by the result.
  template <Precision kPrecision = Precision::kFull>
  CMF_INLINE void apply(Vec<Real>* v, int64_t count) const {
    if (activation == Activation::kGelu) return apply_gelu<kPrecision>(v, count);
    apply<kPrecision>(v, count, [v](int64_t i, Vec<Real> result) { v[i] = result; });
  }

 private:
  template <Precision kPrecision>
  CMF_INLINE void apply_gelu(Vec<Real>* v, int64_t count) const {
    if constexpr (sizeof(Real) == sizeof(double)) {
      for (int64_t i = 0; i < count; ++i) {
        for (int lane = 0; lane < kLanes<double>; ++lane) {
          const double biased = v[i][lane] + bias[lane];
          v[i][lane] = 0.5 * biased * erfc(biased * -M_SQRT1_2) * scale[lane] + shift[lane];
        }
      }
    } else if constexpr (kPrecision == Precision::kFull) {
      apply_gelu_steps<kGelu>(v, count, std::make_integer_sequence<int, kGeluVectors>());
    } else {
      apply_gelu_steps<kShortGelu>(v, count, std::make_integer_sequence<int, kGeluVectors>());
    }
  }

  // The last two steps take about as many vectors each.
  template <const auto& kPolynomial, int... kLess>
  CMF_INLINE void apply_gelu_steps(Vec<Real>* v, int64_t count, std::integer_sequence<int, kLess...>) const {
    static constexpr decltype(&gelu_step<kPolynomial, 1>) kSteps[] = {gelu_step<kPolynomial, kLess + 1>...};
    for (int64_t i = 0, length; i < count; i += length) {
      const int64_t rest = count - i;
      length = rest >= 2 * kGeluVectors ? kGeluVectors : rest > kGeluVectors ? (rest + 1) / 2 : rest;
      kSteps[length - 1](v + i, bias, scale, shift);
    }
  }
};

// A channel vector of parameters, which are stored as S or as its Real; `otherwise` if there are none.
template <class S, class Real = typename S::Real>
Vec<Real> load_parameter(const void* from, bool is_storage, int64_t channel, int64_t channels, Real otherwise) {
  Vec<Real> v = otherwise + Vec<Real>{};
  if (from && is_storage) {
    load_pixels(static_cast<const S*>(from) + channel, 1, 0, channels, 1, &v);
  } else if (from) {
    load_pixels(static_cast<const Native<Real>*>(from) + channel, 1, 0, channels, 1, &v);
  }
  return v;
}

template <class S, class Real = typename S::Real>
Elementwise<Real> load_elementwise(const ElementwiseParams& p, DType dtype, int64_t channel, int64_t channels) {
  const bool is_storage = p.param_dtype == dtype;
  return {load_parameter<S>(p.bias, is_storage, channel, channels, Real(0)),
          load_parameter<S>(p.scale, is_storage, channel, channels, Real(1)),
          load_parameter<S>(p.shift, is_storage, channel, channels, Real(0)), p.activation};
}

}  // namespace
}  // namespace convmixer_fast::cpu
