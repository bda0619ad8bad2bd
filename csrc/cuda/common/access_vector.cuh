// What a thread moves by one load or store.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>
#include <type_traits>

#include "dtypes.cuh"
#include "ptx.cuh"

namespace convmixer_fast::cuda {

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// kCount 16-bit values. In shared memory they are aligned to their size; eight may be aligned to 8 bytes only
// (store_vector).
template <int kCount>
struct alignas(2 * kCount) AccessVector {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4 || kCount == 8);
  uint16_t values[kCount];
};

// Loads what is read-only for the whole launch.
template <int kCount>
__device__ __forceinline__ AccessVector<kCount> load_global(const void* from) {
  AccessVector<kCount> vector;
  if constexpr (kCount == 8) reinterpret_cast<uint4&>(vector) = __ldg(static_cast<const uint4*>(from));
  else if constexpr (kCount == 4) reinterpret_cast<uint2&>(vector) = __ldg(static_cast<const uint2*>(from));
  else if constexpr (kCount == 2) reinterpret_cast<uint32_t&>(vector) = __ldg(static_cast<const uint32_t*>(from));
  else vector.values[0] = __ldg(static_cast<const unsigned short*>(from));
  return vector;
}

// Stores to shared memory, at an address that is aligned to kBytes, or to the vector's size if that is less.
template <int kBytes, int kCount>
__device__ __forceinline__ void store_vector(void* to, const AccessVector<kCount>& vector) {
  static_assert(kBytes == 8 || kBytes == 16);
  if constexpr (kCount == 8) {
    // In one or two instructions: the compiler might take several, with values it has taken apart where it loaded them,
    // and so wait for the loads there.
    const uint4& bits = reinterpret_cast<const uint4&>(vector);
    const uint32_t address = shared_address(to);
    if constexpr (kBytes == 16) {
      store_shared(address, bits);
    } else {
      store_shared(address, make_uint2(bits.x, bits.y));
      store_shared(address + 8, make_uint2(bits.z, bits.w));
    }
  } else {
    *static_cast<AccessVector<kCount>*>(to) = vector;
  }
}

// Calls f with the compile-time constant that equals `width`, a power of two up to 8. Not a switch, whose jump table
// would be read from memory.
template <class F>
__device__ __forceinline__ void with_vector_width(int width, const F& f) {
  if (width >= 8) f(Int<8>{});
  else if (width >= 4) f(Int<4>{});
  else if (width >= 2) f(Int<2>{});
  else f(Int<1>{});
}

// Loads kPitch values from shared memory, 16 bytes at a time.
template <class T, int kPitch>
__device__ __forceinline__ void load_window(arithmetic_t<T> (&window)[kPitch], const T* line) {
  constexpr int kVector = 16 / sizeof(T);
  static_assert(kPitch % kVector == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < kPitch; i += kVector) {
    const uint4 bits = *reinterpret_cast<const uint4*>(line + i);
    const T* const values = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int j = 0; j < kVector; j++) window[i + j] = widen(values[j]);
  }
}

}  // namespace convmixer_fast::cuda
