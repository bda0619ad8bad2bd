// Storage types and the arithmetic type each is computed in.
//
// Terms: docs/glossary.md.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../../params.h"

namespace convmixer_fast::cuda {

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

template <class T>
__device__ __forceinline__ arithmetic_t<T> widen(T value) {
  if constexpr (sizeof(T) == 2) return static_cast<float>(value);
  else return value;
}

template <class T>
__device__ __forceinline__ T narrow(arithmetic_t<T> value) {  // rounds to nearest even
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  else return value;
}

// Calls f with a value of the storage type; cudaErrorInvalidValue if there is no such type.
template <class F>
cudaError_t dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace convmixer_fast::cuda
