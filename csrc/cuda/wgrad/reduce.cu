// The kernel that adds up the partial sums of the weight's and the bias's gradient, always in the same order.
//
// A CTA adds up kSumsPerCta sums of one channel.
#include "../../common/math.h"
#include "../common/dtypes.cuh"
#include "../common/launch.h"
#include "share.h"

namespace convmixer_fast::cuda {

constexpr int kSumsPerCta = 32;
constexpr int kThreadsPerSum = 8;

template <class T>
__global__ void __launch_bounds__(kSumsPerCta* kThreadsPerSum)
    depthwise_wgrad_reduce_kernel(const __grid_constant__ WgradParams params, const __grid_constant__ WgradShare share,
                                  int64_t ctas_per_channel) {
  using Real = arithmetic_t<T>;
  __shared__ double shared[kThreadsPerSum][kSumsPerCta];  // few sums: float64 costs nothing here
  const int64_t channel = blockIdx.x / ctas_per_channel;
  const int64_t channel_block = channel / share.channels;
  const int64_t sum = blockIdx.x % ctas_per_channel * kSumsPerCta + threadIdx.x;
  double total = 0;
  if (sum < share.sums && share.work_tiles > 0) {
    const int64_t last = share.cta_of((channel_block + 1) * share.tiles_per_channel_block - 1);
    for (int64_t cta = share.cta_of(channel_block * share.tiles_per_channel_block) + threadIdx.y; cta <= last;
         cta += kThreadsPerSum)
      total +=
          static_cast<const Real*>(params.workspace)[share.partial(cta, channel_block, channel % share.channels) + sum];
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || sum >= share.sums) return;
  for (int i = 1; i < kThreadsPerSum; i++) total += shared[i][threadIdx.x];
  if (sum == share.sums - 1) {
    if (params.gbias) static_cast<T*>(params.gbias)[channel] = narrow<T>(static_cast<Real>(total));
  } else if (params.gweight) {
    static_cast<T*>(params.gweight)[channel * (share.sums - 1) + sum] = narrow<T>(static_cast<Real>(total));
  }
}

cudaError_t reduce_partials(const WgradParams& params, const WgradShare& share, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto type) {
    const int64_t ctas_per_channel = ceil_div(share.sums, kSumsPerCta);
    const auto ctas = static_cast<unsigned>(params.channels * ctas_per_channel);
    depthwise_wgrad_reduce_kernel<decltype(type)>
        <<<ctas, dim3(kSumsPerCta, kThreadsPerSum), 0, stream>>>(params, share, ctas_per_channel);
    return cudaGetLastError();
  });
}

}  // namespace convmixer_fast::cuda
