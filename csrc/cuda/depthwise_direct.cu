#include "elements.cuh"
#include "launch.h"

namespace convmixer_fast::cuda {

template <class T>  // depthwise_direct.cuh
cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream);

cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto type) { return depthwise_direct<decltype(type)>(params, stream); });
}

}  // namespace convmixer_fast::cuda
