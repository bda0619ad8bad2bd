// The types that tensors are stored in. A storage type names the Real that kernels compute in, turns memory into
// vectors of it, and back (rounding to nearest even).
//
// Terms: docs/glossary.md.
#pragma once
#include "../params.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

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

struct BFloat16 {
  using Real = float;
  static constexpr DType kDType = DType::kBFloat16;
  uint16_t value;
  // The rounded value in the upper half of each lane, zeros in the lower one.
  static CMF_INLINE Bits narrow(Vec<float> v) {
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
  static CMF_INLINE Vec<float> load(const Float16* from) {
    Bits16 v;
    memcpy(&v, from, sizeof v);
    return from_float16(v);
  }
  static CMF_INLINE void store(Float16* to, Vec<float> v) {
    const Bits16 bits = to_float16(v);
    memcpy(to, &bits, sizeof bits);
  }
  static CMF_INLINE Vec<float> round(Vec<float> v) { return from_float16(to_float16(v)); }
};

}  // namespace
}  // namespace convmixer_fast::cpu
