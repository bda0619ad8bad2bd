// The element types of the network's weights, packed panels and blocked maps. A multiply-add consumes kPack of their
// values per lane: 1 for float, 2 for the bfloat16 dot product (pairs along K in the matrix product, pairs of rows in
// the depthwise convolution). Packed is what one lane consumes, PackedVec what all lanes consume.
//
// Terms: docs/glossary.md.
#pragma once
#include "../activation.h"
#include "strassen.h"

namespace convmixer_fast::cpu {
namespace {

struct FloatElement : Native<float> {
  using Packed = float;
  using PackedVec = Vec<float>;
  static constexpr int kPack = 1;
  // Rows of A whose values AVX-512's multiply-adds broadcast themselves, from memory and once per vector of B: more
  // loads, but fewer instructions.
  static constexpr int kRowsLoadedTwice = CMF_HAS_AVX512 ? 8 : 0;

  // Channels per K block. Strassen's accumulator tiles, of which each sub-product changes up to two, had better be read
  // and written more rarely.
  static constexpr int64_t kc(const BilinearScheme& scheme) { return scheme.products > 1 ? 384 : 128; }

  // Channels per summation chain. Without FMA each product is rounded; Strassen's results are differences of larger
  // sums.
  static constexpr int64_t kc_sum(const BilinearScheme& scheme) {
    return scheme.products > 1 ? 64 : CMF_HAS_FMA ? 128 : 64;
  }

  static CMF_INLINE PackedVec broadcast(Packed packed) { return packed - PackedVec{}; }  // (+ would turn -0 into 0)
  static CMF_INLINE FloatElement from(float value) { return {value}; }
  CMF_INLINE void add(float v) { value += v; }

  template <class Store>
  static CMF_INLINE void apply(const Elementwise<float>& elementwise, const Vec<float>* v, int64_t count, Store store) {
    elementwise.apply(v, count, store);
  }
};

#if CMF_HAS_BF16_DOT
struct BFloat16Element : BFloat16 {
  using Packed = int32_t;
  using PackedVec = BFloat16Pairs;
  static constexpr int kPack = 2;
  static constexpr int kRowsLoadedTwice = 0;
  static constexpr int64_t kc(const BilinearScheme&) { return 512; }
  static constexpr int64_t kc_sum(const BilinearScheme& scheme) { return kc(scheme); }

  static CMF_INLINE PackedVec broadcast(Packed packed) { return pairs_of(packed + Bits{}); }
  static CMF_INLINE void store(BFloat16* to, Vec<float> v) {
    const Bits16 bits = to_bfloat16(v);
    memcpy(to, &bits, sizeof bits);
  }
  static CMF_INLINE BFloat16Element from(float value) { return {uint16_t(bit_cast<uint32_t>(value) >> 16)}; }
  CMF_INLINE void add(float v) { value = from(bit_cast<float>(uint32_t(value) << 16) + v).value; }

  // Packs two rows' channel vectors.
  static CMF_INLINE PackedVec interleave(const BFloat16* first, const BFloat16* second) {
    return pairs_of(load_bits16(second) << 16 | load_bits16(first));
  }

  template <class Store>
  static CMF_INLINE void apply(const Elementwise<float>& elementwise, const Vec<float>* v, int64_t count, Store store) {
    if (elementwise.activation != Activation::kGelu) return elementwise.apply(v, count, store);
    // Off by 1.5e-4 of t Phi(-t) for t < 3, by 1.2e-5 at most beyond: little beside the rounding that follows.
    constexpr GeluPolynomials<6, 4> kShort = {
        {-0.00034311707713641226f, 0.006076470948755741f, -0.04918081313371658f, -0.4626516103744507f,
         -1.1500352621078491f, 0.f},
        {0.05517122149467468f, 0.24261100590229034f, 0.6932610273361206f, 0.9999280571937561f}};
    elementwise.apply_unrolled(v, count, [&](auto& z) CMF_INLINE_LAMBDA { gelu(z, kShort); }, store);
  }
};
#endif

}  // namespace
}  // namespace convmixer_fast::cpu
