// What the convolutions multiply.
#pragma once
#include "../activation.h"
#include "strassen.h"

namespace convmixer_fast::cpu {
namespace {

// An operand type is a storage type with which the convolutions multiply: weights, panels and planes are made of it.
// They take kDepth neighbouring values at once, as one Group: the product those of channels, the depthwise convolution
// those of rows, for which `interleave` makes vectors of groups from two rows' vectors.
struct FloatOperand : Native<float> {
  using Group = float;
  using Groups = Vec<float>;
  static constexpr int kDepth = 1;
  // Rows of the left operand that AVX-512's multiplications broadcast themselves: more loads, but fewer instructions.
  static constexpr int kRowsLoadedTwice = CMF_HAS_AVX512 ? 8 : 0;
  // Channels whose weights stay in the nearest cache while panels pass by. Strassen's results, of which each product
  // changes up to two, had better be read and written more rarely.
  static constexpr int64_t chunk(const Scheme& scheme) { return scheme.products > 1 ? 384 : 128; }
  // Channels to sum before they are added to the rest. Without FMA each product is rounded; Strassen's results are
  // differences of larger sums.
  static constexpr int64_t summed_at_once(const Scheme& scheme) {
    return scheme.products > 1 ? 64 : CMF_HAS_FMA ? 128 : 64;
  }
  static CMF_INLINE Groups broadcast(Group group) { return group - Groups{}; }  // (+ would turn -0 into 0)
  static CMF_INLINE FloatOperand from(float value) { return {value}; }
  CMF_INLINE void add(float v) { value += v; }
  template <class F>
  static CMF_INLINE void apply(const Elementwise<float>& pointwise, const Vec<float>* v, int64_t n, F emit) {
    pointwise.apply(v, n, emit);
  }
};

#if CMF_HAS_BF16_DOT
struct BFloat16Operand : BFloat16 {
  using Group = int32_t;
  using Groups = BFloat16Pairs;
  static constexpr int kDepth = 2;
  static constexpr int kRowsLoadedTwice = 0;
  static constexpr int64_t chunk(const Scheme&) { return 512; }
  static constexpr int64_t summed_at_once(const Scheme& scheme) { return chunk(scheme); }
  static CMF_INLINE Groups broadcast(Group group) { return pairs_of(group + Bits{}); }
  static CMF_INLINE void store(BFloat16* to, Vec<float> v) {
    const Bits16 bits = to_bfloat16(v);
    memcpy(to, &bits, sizeof bits);
  }
  static CMF_INLINE BFloat16Operand from(float value) { return {uint16_t(bit_cast<uint32_t>(value) >> 16)}; }
  CMF_INLINE void add(float v) { value = from(bit_cast<float>(uint32_t(value) << 16) + v).value; }
  static CMF_INLINE Groups interleave(const BFloat16* first, const BFloat16* second) {
    return pairs_of(load_bits16(second) << 16 | load_bits16(first));
  }
  template <class F>
  static CMF_INLINE void apply(const Elementwise<float>& pointwise, const Vec<float>* v, int64_t n, F emit) {
    if (pointwise.activation != Activation::kGelu) return pointwise.apply(v, n, emit);
    // Off by 1.5e-4 of t Phi(-t) for t < 3, by 1.2e-5 at most beyond: little beside the rounding that follows.
    constexpr GeluPolynomials<6, 4> kShort = {
        {-0.00034311707713641226f, 0.006076470948755741f, -0.04918081313371658f, -0.4626516103744507f,
         -1.1500352621078491f, 0.f},
        {0.05517122149467468f, 0.24261100590229034f, 0.6932610273361206f, 0.9999280571937561f}};
    pointwise.apply_unrolled(v, n, [&](auto& z) CMF_INLINE_LAMBDA { gelu(z, kShort); }, emit);
  }
};
#endif

}  // namespace
}  // namespace convmixer_fast::cpu
