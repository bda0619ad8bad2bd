#include "../depthwise/direct/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_direct<float>(const DepthwiseParams&, cudaStream_t);
}
