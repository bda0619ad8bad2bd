// The types that tensors are stored in.
#pragma once
#include "../params.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

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

}  // namespace
}  // namespace convmixer_fast::cpu
