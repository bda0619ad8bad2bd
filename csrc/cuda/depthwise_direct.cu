#include "elements.cuh"
#include "launch.h"

namespace convmixer_fast::cuda {

template <class T>  // depthwise_direct.cuh
cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream);

cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream) {
  const auto launch = [&](auto type) { return depthwise_direct<decltype(type)>(params, stream); };
  return without_last_error(dispatch_dtype(params.dtype, launch));
}

}  // namespace convmixer_fast::cuda
