// The elementwise step activation(v + bias) * scale + shift of one channel.
//
// Terms: docs/glossary.md.
#pragma once
#include "access_vector.cuh"
#include "ptx.cuh"

namespace convmixer_fast::cuda {

// x * Phi(x). erfc rather than 1 + erf: no cancellation in the negative tail.
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(-0.70710678118654752f * x); }
__device__ __forceinline__ double gelu(double x) { return 0.5 * x * erfc(-0.70710678118654752 * x); }

// x * Phi(x) for results rounded to 16 bits: max(x, 0) - a Phi(-a) with a = |x|. log2 Phi(-a) is a polynomial of degree
// 5 in a, a minimax fit on [0, 8]: the result is off by at most 0.29 of half an ulp of float16, and below 2^-26 in the
// tail. The leading coefficient is negative, so that far tails need no clamp. 6 FMA, 1 max, 1 MUFU.
// `a` is |x|; from 16 on, where Phi(-a) is 0, it may be 16.
__device__ __forceinline__ float gelu_16bit(float x, float a) {
  float p = fmaf(-3.32734472e-4f, a, 5.94480887e-3f);
  p = fmaf(p, a, -4.86253877e-2f);
  p = fmaf(p, a, -4.63612549e-1f);
  p = fmaf(p, a, -1.14939543f);
  p = fmaf(p, a, -1.00011034f);
  return fmaf(-a, exp2_approx(p), max_nan(x, 0.f));
}

// +-Inf gives NaN.
__device__ __forceinline__ float gelu_16bit(float x) { return gelu_16bit(x, fabsf(x)); }

template <class Real>
__device__ __forceinline__ Real relu(Real x) {
  return x < 0 ? Real(0) : x;  // NaN stays NaN, as in torch
}

template <class T>
struct Elementwise {
  using Real = arithmetic_t<T>;
  Real bias;
  Real scale;
  Real shift;
  Activation activation;

  __device__ Elementwise(const ElementwiseParams& params, int64_t channel) : activation(params.activation) {
    const auto load = [&](const void* values, Real otherwise) -> Real {
      if (values == nullptr) return otherwise;
      switch (params.param_dtype) {
        case DType::kFloat16: return __half2float(static_cast<const __half*>(values)[channel]);
        case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[channel]);
        default: return static_cast<const Real*>(values)[channel];
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

// Calls f with the compile-time constant that equals `activation`: one of those that the tensor-core and the pooling
// kernel are instantiated for (kernel_activation.h).
template <class F>
cudaError_t dispatch_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu: return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kRelu: return f(std::integral_constant<Activation, Activation::kRelu>{});
    default: return cudaErrorInvalidValue;
  }
}

// The activations for results rounded to 16 bits. That of kRelu is a maximum with `floor`.
template <Activation kActivation>
__device__ __forceinline__ float activate_16bit(float v, float floor) {
  static_assert(kActivation == Activation::kGelu || kActivation == Activation::kRelu);
  if constexpr (kActivation == Activation::kGelu) return gelu_16bit(v);
  else return max_nan(v, floor);
}

// Two values in one register.
template <class T>
struct Pair;
template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
};
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  }
};

// Elementwise for results rounded to 16 bits.
template <class T, Activation kActivation>
struct alignas(16) FastElementwise {
  float bias;
  float scale;
  float shift;
  float floor;  // for kRelu: 0, or -inf for no activation

  __device__ FastElementwise(const ElementwiseParams& params, int channel) {
    const Elementwise<T> exact(params, channel);
    bias = exact.bias;
    scale = exact.scale;
    shift = exact.shift;
    floor = params.activation == Activation::kRelu ? 0.f : -INFINITY;
  }
  __device__ __forceinline__ float activate(float v) const { return activate_16bit<kActivation>(v, floor); }

  template <int kCount>
  __device__ __forceinline__ void apply(AccessVector<kCount>& vector) const {
    const auto one = [&](float v) { return fmaf(activate(v + bias), scale, shift); };
    if constexpr (kCount == 1) {
      T& value = reinterpret_cast<T&>(vector.values[0]);
      value = narrow<T>(one(widen(value)));
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; i++) {
        uint32_t& bits = reinterpret_cast<uint32_t*>(vector.values)[i];
        const float2 v = Pair<T>::unpack(bits);
        bits = Pair<T>::pack(one(v.x), one(v.y));
      }
    }
  }
};

}  // namespace convmixer_fast::cuda
