// Division by a value that is the same for the whole launch.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>

namespace convmixer_fast::cuda {

// Divides integers below 2^16 by a value from 2 to 2^16, in one multiplication.
struct Divisor {
  int value;
  uint32_t reciprocal;  // 2^32 / value, rounded up

#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int n) const { return __umulhi(n, reciprocal); }
#endif
};

inline Divisor divisor(int64_t value) {
  return {static_cast<int>(value), static_cast<uint32_t>(((int64_t{1} << 32) + value - 1) / value)};
}

}  // namespace convmixer_fast::cuda
