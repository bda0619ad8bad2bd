// Gradient of a depthwise convolution's weight and bias: the choice between the tensor-core and the direct kernel,
// which leave partial sums in the workspace, and the kernel that adds these up, always in the same order.
#include "depthwise_wgrad_tiles.h"
#include "elements.cuh"
#include "launch.h"

namespace convmixer_fast::cuda {

template <class T>  // depthwise_wgrad_mma.cuh
cudaError_t depthwise_wgrad_mma(const WgradParams& params, const WgradPlan& plan, cudaStream_t stream);
template <class T>  // depthwise_wgrad_direct.cuh
cudaError_t depthwise_wgrad_direct(const WgradParams& params, const WgradPlan& plan, cudaStream_t stream);

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

static cudaError_t make_plan(const WgradParams& params, WgradPlan& plan) {
  WgradDevice of{};
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(of.major, cudaDevAttrComputeCapabilityMajor);
  ask(of.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(of.block_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(of.multiprocessor_smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (status == cudaSuccess) plan = plan_wgrad(params, of);
  return status;
}

cudaError_t depthwise_wgrad_workspace(const WgradParams& params, size_t* bytes) {
  WgradPlan plan;
  const cudaError_t status = without_last_error(make_plan(params, plan));
  if (status == cudaSuccess) *bytes = plan.share.partial_elements() * (params.dtype == DType::kFloat64 ? 8 : 4);
  return status;
}

static cudaError_t launch_partials_and_sum(const WgradParams& params, cudaStream_t stream) {
  if (params.channels == 0 || (!params.gweight && !params.gbias)) return cudaSuccess;
  WgradPlan plan;
  const cudaError_t status = make_plan(params, plan);
  if (status != cudaSuccess) return status;
  return dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&] {
      if constexpr (sizeof(T) == 2)
        if (plan.tensor_cores) return depthwise_wgrad_mma<T>(params, plan, stream);
      return depthwise_wgrad_direct<T>(params, plan, stream);
    };
    if (plan.share.items > 0)
      if (const cudaError_t status = launch(); status != cudaSuccess) return status;
    const dim3 grid(static_cast<unsigned>(params.channels),
                    static_cast<unsigned>((plan.share.sums + kSumsABlock - 1) / kSumsABlock));
    depthwise_wgrad_sum_kernel<T><<<grid, dim3(kSumsABlock, kThreadsASum), 0, stream>>>(params, plan.share);
    return cudaGetLastError();
  });
}

cudaError_t depthwise_wgrad(const WgradParams& params, cudaStream_t stream) {
  return without_last_error(launch_partials_and_sum(params, stream));
}

}  // namespace convmixer_fast::cuda
