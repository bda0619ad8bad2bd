// The kernel that adds up the partial sums of the weight's and the bias's gradient, always in the same order.
#include "../common/dtypes.cuh"
#include "../common/launch.h"
#include "share.h"

namespace convmixer_fast::cuda {

constexpr int kSumsABlock = 32, kThreadsASum = 8;

template <class T>
__global__ void __launch_bounds__(kSumsABlock* kThreadsASum)
    depthwise_wgrad_sum_kernel(const __grid_constant__ WgradParams params, const __grid_constant__ WgradShare share) {
  using Real = arithmetic_t<T>;
  __shared__ double shared[kThreadsASum][kSumsABlock];  // few sums: float64 costs nothing here
  const int64_t channel = blockIdx.x, group = channel / share.channels;
  const int64_t sum = int64_t{blockIdx.y} * kSumsABlock + threadIdx.x;
  double total = 0;
  if (sum < share.sums && share.items > 0) {
    const int64_t last = share.block_of((group + 1) * share.items_a_group - 1);
    for (int64_t block = share.block_of(group * share.items_a_group) + threadIdx.y; block <= last;
         block += kThreadsASum)
      total += static_cast<const Real*>(params.workspace)[share.partial(block, group, channel % share.channels) + sum];
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || sum >= share.sums) return;
  for (int i = 1; i < kThreadsASum; i++) total += shared[i][threadIdx.x];
  if (sum == share.sums - 1) {
    if (params.gbias) static_cast<T*>(params.gbias)[channel] = narrow<T>(static_cast<Real>(total));
  } else if (params.gweight) {
    static_cast<T*>(params.gweight)[channel * (share.sums - 1) + sum] = narrow<T>(static_cast<Real>(total));
  }
}

cudaError_t reduce_partials(const WgradParams& params, const WgradShare& share, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto type) {
    const dim3 grid(static_cast<unsigned>(params.channels),
                    static_cast<unsigned>((share.sums + kSumsABlock - 1) / kSumsABlock));
    depthwise_wgrad_sum_kernel<decltype(type)><<<grid, dim3(kSumsABlock, kThreadsASum), 0, stream>>>(params, share);
    return cudaGetLastError();
  });
}

}  // namespace convmixer_fast::cuda
