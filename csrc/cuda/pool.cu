// The mean over a map of its prologue: what follows the last layer, in one pass.
#include <algorithm>

#include "common/activation.cuh"
#include "common/launch.h"

namespace convmixer_fast::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 8;
constexpr int kBlock = 8;  // pixels whose sum is added at once: less rounding than one by one

// A block owns 32 consecutive planes (n, c). channels_last: a lane a plane, the warps share the pixels. Else: a warp a
// plane at a time, its lanes share the pixels.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kLanes* kWarps) activate_pool_kernel(const __grid_constant__ PoolParams params) {
  using Real = arithmetic_t<T>;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t planes = params.batch * params.channels, pixels = params.height * params.width;

  const auto partial_sum = [&](int64_t plane, int first, int step) {
    const int64_t n = plane / params.channels, c = plane % params.channels;
    const T* const x = static_cast<const T*>(params.x) + n * params.x_stride.n + c * params.x_stride.c;
    const Pointwise<T> prologue(params.prologue, c);
    Real total = 0;
    if (pixels == 0) return total;
    int64_t h = first / params.width, w = first % params.width;
    while (h < params.height) {
      Real sum = 0;
      for (int i = 0; i < kBlock && h < params.height; i++) {
        sum += prologue(widen(x[h * params.x_stride.h + w * params.x_stride.w]));
        for (w += step; w >= params.width; w -= params.width) h++;
      }
      total += sum;
    }
    return total;
  };
  const auto write_mean = [&](int64_t plane, Real sum) {
    static_cast<T*>(params.y)[plane] = narrow<T>(sum / static_cast<Real>(pixels));
  };

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kLanes; first < planes;
       first += static_cast<int64_t>(gridDim.x) * kLanes) {
    if constexpr (kChannelsLast) {
      __shared__ Real sums[kWarps][kLanes];
      const int64_t plane = first + lane;
      sums[warp][lane] = plane < planes ? partial_sum(plane, warp, kWarps) : Real(0);
      __syncthreads();
      if (warp == 0 && plane < planes) {
        Real sum = 0;
        for (int i = 0; i < kWarps; i++) sum += sums[i][lane];
        write_mean(plane, sum);
      }
      __syncthreads();
    } else {
      for (int64_t plane = first + warp; plane < min(first + kLanes, planes); plane += kWarps) {
        Real sum = partial_sum(plane, lane, kLanes);
        for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        if (lane == 0) write_mean(plane, sum);
      }
    }
  }
}

template <class T, bool kChannelsLast>
cudaError_t launch(const PoolParams& params, cudaStream_t stream) {
  const int64_t groups = (params.batch * params.channels + kLanes - 1) / kLanes;
  const int blocks = static_cast<int>(std::min<int64_t>(groups, 1 << 30));
  activate_pool_kernel<T, kChannelsLast><<<blocks, kLanes * kWarps, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t activate_pool(const PoolParams& params, cudaStream_t stream) {
  return without_last_error(dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    return params.x_stride.c == 1 && params.channels > 1 ? launch<T, true>(params, stream)
                                                         : launch<T, false>(params, stream);
  }));
}

}  // namespace convmixer_fast::cuda
