// The choice between the tensor-core and the direct kernel.
#include "common/dtypes.cuh"
#include "common/launch.h"
#include "depthwise/mma/plan.h"

namespace convmixer_fast::cuda {

template <class T, bool kGelu, bool kChannelsLast>  // depthwise/mma/kernel.cuh
cudaError_t depthwise_mma(const DepthwiseParams& params, const MmaPlan& plan, cudaStream_t stream);

template <class T>  // depthwise/direct/kernel.cuh
cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream);

cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream) {
  const auto launch = [&](auto type) { return depthwise_direct<decltype(type)>(params, stream); };
  return without_last_error(dispatch_dtype(params.dtype, launch));
}

template <class T, bool kGelu>
static cudaError_t launch(const DepthwiseParams& params, const MmaPlan& plan, cudaStream_t stream) {
  return (plan.channels_last ? depthwise_mma<T, kGelu, true> : depthwise_mma<T, kGelu, false>)(params, plan, stream);
}

static cudaError_t launch_fastest(const DepthwiseParams& params, cudaStream_t stream) {
  int device = 0;
  int major = 0;
  int smem = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;

  MmaPlan plan;
  if (major < 8 || !choose_mma_plan(params, smem, plan)) return depthwise_direct(params, stream);
  const bool gelu = params.epilogue.activation == Activation::kGelu;
  const bool half = params.dtype == DType::kFloat16;
  if (half && gelu) return launch<__half, true>(params, plan, stream);
  if (!half && gelu) return launch<__nv_bfloat16, true>(params, plan, stream);
  if (!half && !gelu) return launch<__nv_bfloat16, false>(params, plan, stream);
  return launch<__half, false>(params, plan, stream);
}

cudaError_t depthwise(const DepthwiseParams& params, cudaStream_t stream) {
  return without_last_error(launch_fastest(params, stream));
}

}  // namespace convmixer_fast::cuda
