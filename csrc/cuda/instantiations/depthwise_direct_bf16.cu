#include "../depthwise/direct/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_direct<__nv_bfloat16>(const DepthwiseParams&, const DirectPlan&, cudaStream_t);
}
