// Gradient of a depthwise convolution's weight and bias: launches the selected kernel, which leaves partial sums in the
// workspace, and the kernel that adds these up.
#include "common/current_device.h"
#include "common/dtypes.cuh"
#include "common/launch.h"
#include "select.h"

namespace convmixer_fast::cuda {

template <class T>  // wgrad/mma/kernel.cuh
cudaError_t depthwise_wgrad_mma(const WgradParams& params, const WgradMmaPlan& plan, const WgradShare& share,
                                cudaStream_t stream);
template <class T>  // wgrad/direct/kernel.cuh
cudaError_t depthwise_wgrad_direct(const WgradParams& params, const WgradDirectPlan& plan, const WgradShare& share,
                                   cudaStream_t stream);
// wgrad/reduce.cu
cudaError_t reduce_partials(const WgradParams& params, const WgradShare& share, cudaStream_t stream);

static cudaError_t select_for_current_device(const WgradParams& params, WgradChoice& choice) {
  Device device{};
  const cudaError_t status = query_current_device(device);
  if (status == cudaSuccess) choice = select(params, device);
  return status;
}

cudaError_t depthwise_wgrad_workspace(const WgradParams& params, size_t* bytes) {
  WgradChoice choice;
  const cudaError_t status = without_last_error(select_for_current_device(params, choice));
  if (status == cudaSuccess) *bytes = choice.share.partial_elements() * arithmetic_bytes_of(params.dtype);
  return status;
}

static cudaError_t launch_partials_and_reduction(const WgradParams& params, cudaStream_t stream) {
  if (params.channels == 0 || (!params.gweight && !params.gbias)) return cudaSuccess;
  WgradChoice choice;
  const cudaError_t status = select_for_current_device(params, choice);
  if (status != cudaSuccess) return status;
  const auto launch_partials = [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2)
      if (choice.tensor_cores) return depthwise_wgrad_mma<T>(params, choice.mma, choice.share, stream);
    return depthwise_wgrad_direct<T>(params, choice.direct, choice.share, stream);
  };
  if (choice.share.work_tiles > 0)
    if (const cudaError_t status = dispatch_dtype(params.dtype, launch_partials); status != cudaSuccess) return status;
  return reduce_partials(params, choice.share, stream);
}

cudaError_t depthwise_wgrad(const WgradParams& params, cudaStream_t stream) {
  return without_last_error(launch_partials_and_reduction(params, stream));
}

}  // namespace convmixer_fast::cuda
