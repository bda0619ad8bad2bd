// The pointwise step activation(v + bias) * scale + shift of one channel.
#pragma once
#include "elements.cuh"

namespace convmixer_fast::cuda {

// x * Phi(x). erfc rather than 1 + erf: no cancellation in the negative tail.
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(-0.70710678118654752f * x); }
__device__ __forceinline__ double gelu(double x) { return 0.5 * x * erfc(-0.70710678118654752 * x); }

template <class Real>
__device__ __forceinline__ Real relu(Real x) {
  return x < 0 ? Real(0) : x;  // NaN stays NaN, as in torch
}

template <class T>
struct Pointwise {
  using Real = arithmetic_t<T>;
  Real bias, scale, shift;
  Activation activation;

  __device__ Pointwise(const PointwiseParams& params, int64_t channel) : activation(params.activation) {
    const auto load = [&](const void* vector, Real otherwise) -> Real {
      if (vector == nullptr) return otherwise;
      switch (params.vector_dtype) {
        case DType::kFloat16: return __half2float(static_cast<const __half*>(vector)[channel]);
        case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(vector)[channel]);
        default: return static_cast<const Real*>(vector)[channel];
      }
    };
    bias = load(params.bias, 0);
    scale = load(params.scale, 1);
    shift = load(params.shift, 0);
  }

  __device__ __forceinline__ Real operator()(Real v) const {
    v += bias;
    if (activation == Activation::kGelu) v = gelu(v);
    if (activation == Activation::kRelu) v = relu(v);
    return v * scale + shift;
  }
};

}  // namespace convmixer_fast::cuda
