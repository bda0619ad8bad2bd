// The launchers of the depthwise convolution.
#include "common/activation.cuh"
#include "common/current_device.h"
#include "common/dtypes.cuh"
#include "common/kernel_activation.h"
#include "common/launch.h"
#include "select.h"

namespace convmixer_fast::cuda {

template <class T, Activation kActivation, bool kChannelsLast>  // depthwise/mma/kernel.cuh
cudaError_t depthwise_mma(const DepthwiseParams& params, const MmaPlan& plan, int sms, cudaStream_t stream);
template <class T>  // depthwise/direct/kernel.cuh
cudaError_t depthwise_direct(const DepthwiseParams& params, const DirectPlan& plan, cudaStream_t stream);

static cudaError_t launch_mma(const DepthwiseParams& params, const MmaPlan& plan, int sms, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      return dispatch_activation(kernel_activation(params.epilogue.activation), [&](auto activation) {
        constexpr Activation kActivation = decltype(activation)::value;
        return is_channels_last(plan.loader) ? depthwise_mma<T, kActivation, true>(params, plan, sms, stream)
                                             : depthwise_mma<T, kActivation, false>(params, plan, sms, stream);
      });
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

static cudaError_t launch_direct(const DepthwiseParams& params, const DirectPlan& plan, cudaStream_t stream) {
  const auto launch = [&](auto type) { return depthwise_direct<decltype(type)>(params, plan, stream); };
  return dispatch_dtype(params.dtype, launch);
}

static cudaError_t launch_selected(const DepthwiseParams& params, cudaStream_t stream) {
  Device device{};
  if (const cudaError_t status = query_current_device(device); status != cudaSuccess) return status;
  const DepthwiseChoice choice = select(params, device);
  return choice.tensor_cores ? launch_mma(params, choice.mma, device.sms, stream)
                             : launch_direct(params, choice.direct, stream);
}

cudaError_t depthwise(const DepthwiseParams& params, cudaStream_t stream) {
  return without_last_error(launch_selected(params, stream));
}

cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream) {
  return without_last_error(launch_direct(params, choose_direct_plan(params), stream));
}

}  // namespace convmixer_fast::cuda
