// Global average pooling after a prologue: the mean over each map of activation(v + bias) * scale + shift.
//
// Scale and shift are the same for all pixels of a map, so that they are applied once, to the sum of the activations.
// A CTA owns some consecutive channels of an image. The threads of a team share the pixels of a map, or of an octet of
// maps. Which pixels a thread sums, and in which order all sums are added, depends on nothing but the map's size and
// layout: neither on the batch nor on the number of CTAs.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../common/activation.cuh"
#include "../common/kernel_activation.h"
#include "plan.h"

namespace convmixer_fast::cuda {

constexpr int kPoolSums = 8;  // partial sums per thread: they round less than one sum, and need not wait for each other

template <class T_, Activation kActivation_, PoolAccess kAccess_, bool kSmallMaps_>
struct PoolTraits {
  using T = T_;
  using Real = arithmetic_t<T>;
  static constexpr Activation kActivation = kActivation_;  // kRelu also serves kNone, with -inf in place of 0
  static constexpr PoolAccess kAccess = kAccess_;
  static constexpr PoolShape kShape = pool_shape(kAccess, kSmallMaps_);
  static constexpr bool kAlongChannels = kAccess == PoolAccess::kOctet || kAccess == PoolAccess::kChannels;
  static constexpr bool kIsVector = kAccess == PoolAccess::kRun || kAccess == PoolAccess::kOctet;
  static constexpr int kVector = kIsVector ? 16 / sizeof(T) : 1;  // elements per load
  static constexpr int kLoads = kIsVector ? 4 : kPoolSums;        // under way at the same time, per thread
  // Loads of a thread whose values make 256 terms of each partial sum, before all are added to a total: of a large map,
  // a single sum would round more and more of each pixel away.
  static constexpr int kChunk = 256 * kPoolSums / kVector;
  // 32 warps per SM hide the latency of memory, and leave each thread 64 registers. float64 needs more.
  static constexpr int kMinCtas = sizeof(T) == 8 ? 1 : 1024 / kShape.threads;
  static_assert(kAlongChannels || 32 % kShape.team == 0, "a team is part of one warp");
  static_assert(kVector <= kShape.team, "a thread each for the pixels that fill no vector");
  static_assert(kAccess != PoolAccess::kOctet || kVector == kShape.channels, "an octet per load");
};

// What one load brings.
template <class T, int kVector>
struct PoolVector {
  using Bits = std::conditional_t<kVector == 1, T, uint4>;
  static_assert(sizeof(Bits) == kVector * sizeof(T));
  Bits bits;

  static __device__ __forceinline__ PoolVector load(const T* from) {
    return {__ldg(reinterpret_cast<const Bits*>(from))};
  }

  // Calls f(i, value i), in the type of the arithmetic.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    if constexpr (kVector == 1) {
      f(0, widen(bits));
    } else if constexpr (sizeof(T) == 2) {
      const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        const float2 pair = Pair<T>::unpack(words[i / 2]);
        f(i, pair.x);
        f(i + 1, pair.y);
      }
    } else {
      const float4& values = reinterpret_cast<const float4&>(bits);
      f(0, values.x);
      f(1, values.y);
      f(2, values.z);
      f(3, values.w);
    }
  }
};

// What the pixels of one channel add to a sum.
template <class T, Activation kActivation>
class PoolSummand {
 public:
  using Real = arithmetic_t<T>;

  PoolSummand() = default;
  __device__ PoolSummand(const PoolParams& params, const PoolPlan& plan, Real bias)
      : bias_(bias),
        weight_(plan.weight),
        floor_(params.prologue.activation == Activation::kRelu ? Real(0) : -Real(INFINITY)) {}

  __device__ __forceinline__ void add(Real& sum, Real v) const { sum = fma(activate(v + bias_), weight_, sum); }

 private:
  __device__ __forceinline__ Real activate(Real v) const {
    if constexpr (kActivation == Activation::kGelu && sizeof(T) == 2)
      return gelu_16bit(v, fabsf(fminf(v, 16.f)));  // Inf stays Inf, and -Inf becomes NaN, as in torch
    else if constexpr (kActivation == Activation::kGelu) return gelu(v);
    else if constexpr (sizeof(Real) == 4) return max_nan(v, floor_);
    else return v < floor_ ? floor_ : v;  // NaN stays NaN
  }

  Real bias_;
  Real weight_;
  Real floor_;
};

// Scale and shift come before the division, which then is the only rounding if the sums are exact.
template <class T>
__device__ __forceinline__ void write_mean(const PoolParams& params, const PoolPlan& plan, int64_t image,
                                           int64_t channel, const Elementwise<T>& prologue, arithmetic_t<T> sum) {
  using Real = arithmetic_t<T>;
  const Real count = static_cast<Real>(plan.pixels) * plan.weight;  // 0.5 to 1, or 0: the mean of no pixels is NaN
  static_cast<T*>(params.y)[image * params.channels + channel] =
      narrow<T>(fma(sum, prologue.scale, prologue.shift * count) / count);
}

// The pixels of one thread: member, member + team, ... of a map.
template <class Traits>
class PixelWalk {
 public:
  using T = typename Traits::T;
  static constexpr int kTeam = Traits::kShape.team;

  __device__ PixelWalk(const PoolPlan& plan, const T* map, int member)
      : plan_(plan),
        at_(map + member * plan.col_stride),
        col_(member),
        left_((plan.pixels - member + kTeam - 1) / kTeam) {
    if (col_ < plan.width) return;
    col_ = member % plan.width;
    at_ = map + member / plan.width * plan.row_stride + col_ * plan.col_stride;
  }

  __device__ __forceinline__ const T* at() const { return at_; }
  __device__ __forceinline__ void next() {
    at_ += plan_.step_offset;
    col_ += plan_.step_cols;
    if (col_ >= plan_.width) {
      col_ -= plan_.width;
      at_ += plan_.wrap_offset;
    }
  }

  // Pixels of the next chunk; 0 after the last.
  __device__ __forceinline__ int next_chunk() {
    const int count = static_cast<int>(min(left_, static_cast<int64_t>(Traits::kChunk)));
    left_ -= count;
    return count;
  }

 private:
  const PoolPlan& plan_;
  const T* at_;
  int col_;
  int64_t left_;
};

// Adds a thread's pixels of a run to its partial sums. The run starts on 16 bytes; its last pixels may fill no vector.
template <class Traits>
__device__ __forceinline__ void sum_run(const typename Traits::T* run, int pixels, int member,
                                        const PoolSummand<typename Traits::T, Traits::kActivation>& summand,
                                        typename Traits::Real (&sums)[kPoolSums]) {
  using Real = typename Traits::Real;
  using Vector = PoolVector<typename Traits::T, Traits::kVector>;
  constexpr int kTeam = Traits::kShape.team;
  const int vectors = pixels / Traits::kVector;
  for (int first = member; first < vectors; first += Traits::kLoads * kTeam) {
    Vector loaded[Traits::kLoads];
#pragma unroll
    for (int i = 0; i < Traits::kLoads; i++)
      if (first + i * kTeam < vectors) loaded[i] = Vector::load(run + (first + i * kTeam) * Traits::kVector);
#pragma unroll
    for (int i = 0; i < Traits::kLoads; i++) {
      if (first + i * kTeam >= vectors) break;
      loaded[i].for_each([&](int j, Real v) { summand.add(sums[(i * Traits::kVector + j) % kPoolSums], v); });
    }
  }
  const int last = vectors * Traits::kVector + member;
  if (last < pixels) summand.add(sums[0], widen(run[last]));
}

// Adds the next `count` pixels of a walk to the partial sums: those of one map, or those of the eight maps of an octet,
// each of which has one partial sum.
template <class Traits>
__device__ __forceinline__ void sum_walk(PixelWalk<Traits>& walk, int count,
                                         const PoolSummand<typename Traits::T, Traits::kActivation>* summands,
                                         typename Traits::Real (&sums)[kPoolSums]) {
  using Real = typename Traits::Real;
  using Vector = PoolVector<typename Traits::T, Traits::kVector>;
  for (int first = 0; first < count; first += Traits::kLoads) {
    Vector loaded[Traits::kLoads];
#pragma unroll
    for (int i = 0; i < Traits::kLoads; i++) {
      if (first + i >= count) break;
      loaded[i] = Vector::load(walk.at());
      walk.next();
    }
#pragma unroll
    for (int i = 0; i < Traits::kLoads; i++) {
      if (first + i >= count) break;
      loaded[i].for_each([&](int j, Real v) { summands[j].add(sums[Traits::kVector == 1 ? i : j], v); });
    }
  }
}

template <class Real>
__device__ __forceinline__ Real total(const Real (&sums)[kPoolSums]) {
  static_assert(kPoolSums == 8);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class T>
__device__ __forceinline__ const T* map_at(const PoolParams& params, int64_t image, int64_t channel) {
  return static_cast<const T*>(params.x) + image * params.x_stride.n + channel * params.x_stride.c;
}

// The sum of one thread's pixels of a map, chunk by chunk.
template <class Traits>
__device__ __forceinline__ typename Traits::Real sum_map(
    const PoolPlan& plan, const typename Traits::T* map, int member,
    const PoolSummand<typename Traits::T, Traits::kActivation>& summand) {
  using Real = typename Traits::Real;
  Real sum = 0;
  if constexpr (Traits::kAccess == PoolAccess::kRun) {
    constexpr int kPixels = Traits::kChunk * Traits::kShape.team * Traits::kVector;
    const int pixels = static_cast<int>(plan.pixels);
    for (int first = 0; first < pixels; first += kPixels) {
      Real sums[kPoolSums] = {};
      sum_run<Traits>(map + first, min(pixels - first, kPixels), member, summand, sums);
      sum += total(sums);
    }
  } else {
    PixelWalk<Traits> walk(plan, map, member);
    while (const int count = walk.next_chunk()) {
      Real sums[kPoolSums] = {};
      sum_walk<Traits>(walk, count, &summand, sums);
      sum += total(sums);
    }
  }
  return sum;
}

// Teams are lanes of a warp, which has a map for each of them.
template <class Traits>
__device__ __forceinline__ void pool_along_maps(const PoolParams& params, const PoolPlan& plan, int64_t image,
                                                int64_t first_channel) {
  using T = typename Traits::T;
  using Real = typename Traits::Real;
  constexpr int kTeam = Traits::kShape.team;
  const int member = threadIdx.x % kTeam;
  const int64_t channel = first_channel + threadIdx.x / kTeam;
  const bool exists = channel < params.channels;
  const Elementwise<T> prologue(params.prologue, exists ? channel : 0);
  Real sum = 0;
  if (exists) {
    const PoolSummand<T, Traits::kActivation> summand(params, plan, prologue.bias);
    sum = sum_map<Traits>(plan, map_at<T>(params, image, channel), member, summand);
  }
#pragma unroll
  for (int offset = kTeam / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (exists && member == 0) write_mean(params, plan, image, channel, prologue, sum);
}

// Neighbouring lanes have neighbouring channels, or octets. The threads of a team meet in shared memory. Two barriers
// suffice from tile to tile: biases are read before the second barrier and overwritten after it, sums are read after
// the second barrier and overwritten after the next tile's first.
template <class Traits>
__device__ __forceinline__ void pool_along_channels(const PoolParams& params, const PoolPlan& plan, int64_t image,
                                                    int64_t first_channel) {
  using T = typename Traits::T;
  using Real = typename Traits::Real;
  constexpr PoolShape kShape = Traits::kShape;
  constexpr int kLanes = kShape.threads / kShape.team;  // threads that read one pixel
  __shared__ Real biases[kShape.maps()];
  __shared__ Real sums_of[kShape.team][kShape.maps()];

  const int64_t channel = first_channel + threadIdx.x;  // whose mean this thread writes, if it does
  const bool writes = threadIdx.x < kShape.maps() && channel < params.channels;
  const Elementwise<T> prologue(params.prologue, writes ? channel : 0);
  if (writes) biases[threadIdx.x] = prologue.bias;
  __syncthreads();

  const int member = threadIdx.x / kLanes;
  const int own = threadIdx.x % kLanes * kShape.channels;
  if (first_channel + own < params.channels) {
    const T* const map = map_at<T>(params, image, first_channel + own);
    PoolSummand<T, Traits::kActivation> summands[kShape.channels];
#pragma unroll
    for (int i = 0; i < kShape.channels; i++) summands[i] = {params, plan, biases[own + i]};
    if constexpr (kShape.channels == 1) {
      sums_of[member][own] = sum_map<Traits>(plan, map, member, summands[0]);
    } else {
      for (int i = 0; i < kShape.channels; i++) sums_of[member][own + i] = 0;
      PixelWalk<Traits> walk(plan, map, member);
      while (const int count = walk.next_chunk()) {
        Real sums[kPoolSums] = {};
        sum_walk<Traits>(walk, count, summands, sums);
        for (int i = 0; i < kShape.channels; i++) sums_of[member][own + i] += sums[i];
      }
    }
  }
  __syncthreads();

  if (writes) {
    Real sum = 0;
    for (int i = 0; i < kShape.team; i++) sum += sums_of[i][threadIdx.x];
    write_mean(params, plan, image, channel, prologue, sum);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kShape.threads, Traits::kMinCtas)
    activate_pool_kernel(const __grid_constant__ PoolParams params, const __grid_constant__ PoolPlan plan) {
  const int64_t tiles = params.batch * plan.channel_blocks;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t image = tile / plan.channel_blocks;
    const int64_t first_channel = tile % plan.channel_blocks * Traits::kShape.maps();
    if constexpr (Traits::kAlongChannels) pool_along_channels<Traits>(params, plan, image, first_channel);
    else pool_along_maps<Traits>(params, plan, image, first_channel);
  }
}

// Calls f with an object of the traits of `plan`: those that choose_pool_plan gives for T.
template <class T, Activation kActivation, class F>
cudaError_t dispatch_pool_traits(const PoolPlan& plan, const F& f) {
  switch (plan.access) {
    case PoolAccess::kRun:
      if constexpr (sizeof(T) <= 4)
        return plan.small_maps ? f(PoolTraits<T, kActivation, PoolAccess::kRun, true>{})
                               : f(PoolTraits<T, kActivation, PoolAccess::kRun, false>{});
      break;
    case PoolAccess::kPixel:
      return plan.small_maps ? f(PoolTraits<T, kActivation, PoolAccess::kPixel, true>{})
                             : f(PoolTraits<T, kActivation, PoolAccess::kPixel, false>{});
    case PoolAccess::kOctet:
      if constexpr (sizeof(T) == 2) return f(PoolTraits<T, kActivation, PoolAccess::kOctet, false>{});
      break;
    case PoolAccess::kChannels: return f(PoolTraits<T, kActivation, PoolAccess::kChannels, false>{});
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t activate_pool(const PoolParams& params, const PoolPlan& plan, cudaStream_t stream) {
  const auto launch = [&](auto traits) {
    using Traits = decltype(traits);
    const int ctas = static_cast<int>(std::min<int64_t>(params.batch * plan.channel_blocks, 1 << 30));
    activate_pool_kernel<Traits><<<ctas, Traits::kShape.threads, 0, stream>>>(params, plan);
    return cudaGetLastError();
  };
  return dispatch_activation(kernel_activation(params.prologue.activation), [&](auto activation) {
    return dispatch_pool_traits<T, decltype(activation)::value>(plan, launch);
  });
}

}  // namespace convmixer_fast::cuda
