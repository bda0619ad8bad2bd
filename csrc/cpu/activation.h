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

// gelu(x) = max(x, 0) - t Phi(-t), t = |x|: no cancellation. log2(2 Phi(-t)) is close to a parabola without a constant
// and is a polynomial here, as is 2^f.
template <int kLog2, int kExp2>
struct GeluPolynomials {
  float log2[kLog2];  // from the highest power down
  float exp2[kExp2];  // the same for 2^f, which the exponent will halve
};
// Together they are off by 1.1e-7 Phi(-t) for t < 0.75, by 1.9e-8 / t beyond.
constexpr GeluPolynomials<10, 6> kGelu = {{4.190667317218388e-07f, -8.221937960584197e-06f, 6.719936871101976e-05f,
                                           -0.00026057253440669136f, -2.6314870177938595e-05f, 0.006972101349101637f,
                                           -0.052456833008752334f, -0.45921580372912024f, -1.1511047538621313f, 0.f},
                                          {0.0013264727391703653f, 0.009671512917326526f, 0.05550733745336358f,
                                           0.24022242081104875f, 0.6931469775964698f, 1.f}};

// The same with shorter formulas, for results that are rounded to bfloat16. The relative error of t Phi(-t) is 1.5e-4
// for t < 3, the absolute one 1.2e-5 beyond; half an ulp of bfloat16 is 2e-3.
constexpr GeluPolynomials<6, 4> kShortGelu = {
    {-0.00034311707713641226f, 0.006076470948755741f, -0.04918081313371658f, -0.4626516103744507f, -1.1500352621078491f,
     0.f},
    {0.05517122149467468f, 0.24261100590229034f, 0.6932610273361206f, 0.9999280571937561f}};

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

// x = gelu(x), for kCount vectors interleaved: one by one, each would wait for the last term of its own polynomials.
template <int kCount, int kLog2, int kExp2>
CMF_INLINE void gelu(Vec<float> (&x)[kCount], const GeluPolynomials<kLog2, kExp2>& polynomials) {
  constexpr float kRound = 0x1.8p23f - 1;  // added, it leaves the nearest integer, less 1, in the last bits
  Vec<float> t[kCount], log2[kCount], exponent[kCount], phi[kCount];
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) {
    const Vec<float> magnitude = bit_cast<Vec<float>>(bit_cast<Bits>(x[c]) & 0x7fffffff);
    t[c] = vector_min(magnitude, 8 + Vec<float>{});  // t Phi(-t) is 3e-14 there
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
    x[c] = vector_max(Vec<float>{}, x[c]) - t[c] * phi[c];
  }
}

// Vectors whose GELU is computed at the same time: enough to hide its latency.
constexpr int kGeluVectors = CMF_VECTOR_REGISTERS == 32 ? 8 : 6;

// v[i] = gelu(v[i] + bias) * scale + shift for kCount vectors. Not inline: it wants all vector registers, of which
// callers have none to spare.
template <const auto& kPolynomials, int kCount>
__attribute__((noinline)) void gelu_step(Vec<float>* v, const Vec<float>& bias, const Vec<float>& scale,
                                         const Vec<float>& shift) {
  Vec<float> z[kCount];
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) z[c] = v[c] + bias;
  gelu(z, kPolynomials);
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
  template <const auto& kPolynomials, int... kLess>
  CMF_INLINE void apply_gelu_steps(Vec<Real>* v, int64_t count, std::integer_sequence<int, kLess...>) const {
    static constexpr decltype(&gelu_step<kPolynomials, 1>) kSteps[] = {gelu_step<kPolynomials, kLess + 1>...};
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
