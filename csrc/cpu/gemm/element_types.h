// The element types of the network's weights, packed panels and blocked maps. A multiply-add consumes kPack of their
// values per lane: 1 for float, 2 for the bfloat16 dot product (pairs along K in the matrix product, pairs of rows in
// the depthwise convolution). Packed is what one lane consumes, PackedVec what all lanes consume. `broadcast`, `from`
// and `add` serve the packing and the product, kc and chain its blocking.
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
  static constexpr Precision kPrecision = Precision::kFull;
  // Rows of A whose values the FMA itself broadcasts from memory (AVX-512), once per vector of output channels: more
  // loads, but fewer instructions.
  static constexpr int kRowsLoadedTwice = CMF_HAS_AVX512 ? 8 : 0;

  // Channels per K block. Each of Strassen's sub-products reads and writes up to two result tiles per K block, so its
  // blocks are longer; their slices of B then come from the L2 cache. With 16 registers an A panel has 6 pixels and
  // not 14, so that slices are read more often: there they fit an L1 cache of 32 KB.
  static constexpr int64_t kc(const BilinearScheme& scheme) {
    if (scheme.products == 1) return 128;
    return CMF_VECTOR_REGISTERS == 32 ? 384 : 192;
  }

  // Channels per summation chain. Without FMA each product is rounded; Strassen's results are differences of larger
  // sums.
  static constexpr int64_t chain(const BilinearScheme& scheme) {
    return scheme.products > 1 ? 64 : CMF_HAS_FMA ? 128 : 64;
  }

  static CMF_INLINE PackedVec broadcast(Packed packed) { return packed - PackedVec{}; }  // (+ would turn -0 into 0)
  static CMF_INLINE FloatElement from(float value) { return {value}; }
  CMF_INLINE void add(float v) { value += v; }
};

#if CMF_HAS_BF16_DOT
struct BFloat16Element : BFloat16 {
  using Packed = int32_t;
  using PackedVec = BFloat16Pairs;
  static constexpr int kPack = 2;
  static constexpr Precision kPrecision = Precision::kBFloat16;
  static constexpr int kRowsLoadedTwice = 0;
  static constexpr int64_t kc(const BilinearScheme&) { return 512; }  // 2 bytes each: a slice of B is 32 KB
  static constexpr int64_t chain(const BilinearScheme& scheme) { return kc(scheme); }

  static CMF_INLINE PackedVec broadcast(Packed packed) { return pairs_of(packed + Bits{}); }
  static CMF_INLINE void store(BFloat16* to, Vec<float> v) {
    const Bits16 bits = to_bfloat16(v);
    memcpy(to, &bits, sizeof bits);
  }
  // Exact, and no rounding: the values are bfloat16's, and `add` only ever adds to 0 (packing without a scheme).
  static CMF_INLINE BFloat16Element from(float value) { return {uint16_t(bit_cast<uint32_t>(value) >> 16)}; }
  CMF_INLINE void add(float v) { value = from(bit_cast<float>(uint32_t(value) << 16) + v).value; }

  // Pairs two rows' channel vectors lane by lane, the first one's values in the low halves.
  static CMF_INLINE PackedVec interleave(const BFloat16* first, const BFloat16* second) {
    return pairs_of(load_bits16(second) << 16 | load_bits16(first));
  }
};
#endif

}  // namespace
}  // namespace convmixer_fast::cpu
