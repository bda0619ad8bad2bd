// Gradient of a depthwise convolution's weight and bias: the choice between the tensor-core and the direct kernel,
// which leave partial sums in the workspace, and the launch of the kernel that adds these up.
#include "common/dtypes.cuh"
#include "common/launch.h"
#include "wgrad/plan.h"

namespace convmixer_fast::cuda {

template <class T>  // wgrad/mma/kernel.cuh
cudaError_t depthwise_wgrad_mma(const WgradParams& params, const WgradPlan& plan, cudaStream_t stream);
template <class T>  // wgrad/direct/kernel.cuh
cudaError_t depthwise_wgrad_direct(const WgradParams& params, const WgradPlan& plan, cudaStream_t stream);

// wgrad/reduce.cu
cudaError_t reduce_partials(const WgradParams& params, const WgradShare& share, cudaStream_t stream);

static cudaError_t make_plan(const WgradParams& params, WgradPlan& plan) {
  WgradDevice result{};
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(result.major, cudaDevAttrComputeCapabilityMajor);
  ask(result.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(result.cta_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(result.sm_smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (status == cudaSuccess) plan = plan_wgrad(params, result);
  return status;
}

cudaError_t depthwise_wgrad_workspace(const WgradParams& params, size_t* bytes) {
  WgradPlan plan;
  const cudaError_t status = without_last_error(make_plan(params, plan));
  if (status == cudaSuccess) *bytes = plan.share.partial_elements() * arithmetic_bytes_of(params.dtype);
  return status;
}

static cudaError_t launch_partials_and_reduction(const WgradParams& params, cudaStream_t stream) {
  if (params.channels == 0 || (!params.gweight && !params.gbias)) return cudaSuccess;
  WgradPlan plan;
  const cudaError_t status = make_plan(params, plan);
  if (status != cudaSuccess) return status;
  const auto launch_partials = [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2)
      if (plan.tensor_cores) return depthwise_wgrad_mma<T>(params, plan, stream);
    return depthwise_wgrad_direct<T>(params, plan, stream);
  };
  if (plan.share.work_tiles > 0)
    if (const cudaError_t status = dispatch_dtype(params.dtype, launch_partials); status != cudaSuccess) return status;
  return reduce_partials(params, plan.share, stream);
}

cudaError_t depthwise_wgrad(const WgradParams& params, cudaStream_t stream) {
  return without_last_error(launch_partials_and_reduction(params, stream));
}

}  // namespace convmixer_fast::cuda
