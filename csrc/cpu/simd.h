// SIMD vectors. They are the compiler's own (GCC, Clang), so that kernels are plain arithmetic; every intrinsic of
// the kernels, for what plain arithmetic cannot say, is in this file.
//
// The CPU kernels are one source for every instruction set. Each translation unit in isa/ has its target pragma, states
// in CMF_HAS_* what that brings (GCC 12 defines no macros of its own for a pragma in C++) and includes the kernels
// once. Everything has internal linkage and no function of the standard library is instantiated: nothing that is
// compiled for a wide instruction set can be linked into the path of a narrower one.
//
// Terms: docs/glossary.md.
#pragma once
#include <string.h>

#include <cstdint>
#include <utility>
#if CMF_HAS_AVX
#include <immintrin.h>
#endif

#define CMF_INLINE inline __attribute__((always_inline))
#define CMF_INLINE_LAMBDA __attribute__((always_inline))

namespace convmixer_fast::cpu {
namespace {

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

// Makes the compiler forget what it knows of v: it cannot combine what made it with what is made of it, and holds it in
// a vector register in between.
template <class V>
CMF_INLINE void opaque(V& v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
#elif CMF_HAS_AVX512
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#else
  (void)v;  // no constraint is known for its registers
#endif
}

CMF_INLINE Bits load_bits16(const void* from) {
  Bits16 v;
  memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Bits);
}

CMF_INLINE void store_bits16(void* to, Bits v) {
  const Bits16 narrow = __builtin_convertvector(v, Bits16);
  memcpy(to, &narrow, sizeof narrow);
}

template <class V>
CMF_INLINE V multiply_add(V sum, V a, V b) {
  return sum + a * b;
}

// The lanes kFrom of a and b, b's lanes counted after a's.
template <int... kFrom, class V>
CMF_INLINE V shuffle(const V& a, const V& b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{kFrom...});
#endif
}

// Exchanges the blocks of kBlock lanes that a transpose of a 2 x 2 matrix of such blocks exchanges.
template <int kBlock, class V, int... kLane>
CMF_INLINE void exchange_blocks(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V low = shuffle<(kLane & kBlock ? kLane - kBlock + kCount : kLane)...>(a, b);
  b = shuffle<(kLane & kBlock ? kLane + kCount : kLane + kBlock)...>(a, b);
  a = low;
}

// Interleaves the lanes of a and b within each kUnit lanes: a gets the first halves of both there, b the second ones.
template <int kUnit, class V, int... kLane>
CMF_INLINE void interleave(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V first = shuffle<(kLane - kLane % kUnit + kLane % kUnit / 2 + kLane % 2 * kCount)...>(a, b);
  b = shuffle<(kLane - kLane % kUnit + kLane % kUnit / 2 + kUnit / 2 + kLane % 2 * kCount)...>(a, b);
  a = first;
}

// Transposes a square matrix in log2 kCount passes; the first kBlock is kCount / 2. Blocks of 16 bytes and more are
// exchanged, smaller ones interleaved within 16 bytes, which is one instruction each (an exchange would take two).
template <int kBlock, class V, size_t kCount>
CMF_INLINE void transpose(V (&v)[kCount]) {
  if constexpr (kBlock > 0) {
    constexpr int kUnit = 16 / sizeof(v[0][0]);
    constexpr auto kLane = std::make_integer_sequence<int, kCount>();
#pragma GCC unroll 16
    for (size_t i = 0; i < kCount; ++i) {
      if (i & kBlock) continue;
      if constexpr (kBlock >= kUnit) {
        exchange_blocks<kBlock>(v[i], v[i + kBlock], kLane);
      } else {
        interleave<kUnit>(v[i], v[i + kBlock], kLane);
      }
    }
    transpose<kBlock / 2>(v);
  }
}

// Minimum and maximum, or b if one is NaN: one instruction each, which GCC does not recognize in a ? b : c.
CMF_INLINE Vec<float> vector_min(Vec<float> a, Vec<float> b) {
#if CMF_HAS_AVX512
  return bit_cast<Vec<float>>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif CMF_HAS_AVX
  return bit_cast<Vec<float>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

CMF_INLINE Vec<float> vector_max(Vec<float> a, Vec<float> b) {
#if CMF_HAS_AVX512
  return bit_cast<Vec<float>>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif CMF_HAS_AVX
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// Rounds to nearest even. (The AVX-512 forms without a mask make GCC 12 warn, here and below.)
CMF_INLINE Bits16 to_float16(Vec<float> v) {
#if CMF_HAS_AVX512
  return bit_cast<Bits16>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), 0));
#elif CMF_HAS_F16C
  return bit_cast<Bits16>(_mm256_cvtps_ph(bit_cast<__m256>(v), 0));
#else
  const Bits bits = bit_cast<Bits>(v);
  const Bits magnitude = bits & 0x7fffffff;
  const Bits normal = magnitude - (112 << 23) + (0xfff + (magnitude >> 13 & 1));  // rebias, to nearest even
  // Adding 0.5 leaves the multiples of 2^-24, the spacing of float16's subnormals, in the last bits.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) + 0.5f) - (126 << 23);
  const Bits special = 0x7c00 | ((magnitude > (255 << 23)) & (0x200 | (magnitude >> 13 & 0x3ff)));
  const Bits finite = magnitude < (113 << 23) ? subnormal : normal >> 13;
  const Bits half = magnitude < (143 << 23) ? finite : special;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), Bits16);
#endif
}

CMF_INLINE Vec<float> from_float16(Bits16 v) {
#if CMF_HAS_AVX512
  return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v)));
#elif CMF_HAS_F16C
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#else
  const Bits bits = __builtin_convertvector(v, Bits);
  const Bits magnitude = (bits & 0x7fff) << 13;
  const Bits finite = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);  // exact, subnormals too
  const Bits special = magnitude | (255 << 23);
  return bit_cast<Vec<float>>((magnitude < (31 << 23) ? finite : special) | (bits & 0x8000) << 16);
#endif
}

#if CMF_HAS_BF16_DOT
// Rounds to nearest even.
CMF_INLINE Bits16 to_bfloat16(Vec<float> v) { return bit_cast<Bits16>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))); }

// Two bfloat16 values per lane.
struct BFloat16Pairs {
  __m512bh values;
};

CMF_INLINE BFloat16Pairs pairs_of(Bits bits) { return {bit_cast<__m512bh>(bits)}; }

// Adds both products of each lane.
CMF_INLINE Vec<float> multiply_add(Vec<float> sum, BFloat16Pairs a, BFloat16Pairs b) {
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), a.values, b.values));
}
#endif

}  // namespace
}  // namespace convmixer_fast::cpu
