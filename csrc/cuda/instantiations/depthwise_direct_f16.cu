#include "../depthwise/direct/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_direct<__half>(const DepthwiseParams&, cudaStream_t);
}
