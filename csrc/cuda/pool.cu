// Global average pooling with a prologue, which follows the last layer, in one pass.
//
// Terms: docs/glossary.md.
#include <algorithm>

#include "../common/math.h"
#include "common/activation.cuh"
#include "common/launch.h"

namespace convmixer_fast::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kBlock = 8;  // pixels that are summed before they are added to the total: less rounding than one by one

// A CTA owns 32 consecutive maps (n, c). In channels_last each lane has one map, and the warps share its pixels. Else
// each warp has one map at a time, and its lanes share the pixels.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kLanes* kWarps) activate_pool_kernel(const __grid_constant__ PoolParams params) {
  using Real = arithmetic_t<T>;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int64_t maps = params.batch * params.channels;
  const int64_t pixels = params.height * params.width;

  const auto partial_sum = [&](int64_t map, int first, int step) {
    const int64_t n = map / params.channels;
    const int64_t c = map % params.channels;
    const T* const x = static_cast<const T*>(params.x) + n * params.x_stride.n + c * params.x_stride.c;
    const Elementwise<T> prologue(params.prologue, c);
    Real total = 0;
    if (pixels == 0) return total;
    int64_t h = first / params.width;
    int64_t w = first % params.width;
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
  const auto write_mean = [&](int64_t map, Real sum) {
    static_cast<T*>(params.y)[map] = narrow<T>(sum / static_cast<Real>(pixels));
  };

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kLanes; first < maps;
       first += static_cast<int64_t>(gridDim.x) * kLanes) {
    if constexpr (kChannelsLast) {
      __shared__ Real sums[kWarps][kLanes];
      const int64_t map = first + lane;
      sums[warp][lane] = map < maps ? partial_sum(map, warp, kWarps) : Real(0);
      __syncthreads();
      if (warp == 0 && map < maps) {
        Real sum = 0;
        for (int i = 0; i < kWarps; i++) sum += sums[i][lane];
        write_mean(map, sum);
      }
      __syncthreads();
    } else {
      for (int64_t map = first + warp; map < min(first + kLanes, maps); map += kWarps) {
        Real sum = partial_sum(map, lane, kLanes);
        for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        if (lane == 0) write_mean(map, sum);
      }
    }
  }
}

template <class T, bool kChannelsLast>
cudaError_t launch(const PoolParams& params, cudaStream_t stream) {
  const int64_t map_blocks = ceil_div(params.batch * params.channels, kLanes);
  const int ctas = static_cast<int>(std::min<int64_t>(map_blocks, 1 << 30));
  activate_pool_kernel<T, kChannelsLast><<<ctas, kLanes * kWarps, 0, stream>>>(params);
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
