#include "depthwise_direct.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_direct<__half>(const DepthwiseParams&, cudaStream_t);
}
