#include "../depthwise/direct/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_direct<__half>(const DepthwiseParams&, const DirectPlan&, cudaStream_t);
}
