#include "../depthwise/mma/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_mma<__half, true, false>(const DepthwiseParams&, const MmaPlan&, cudaStream_t);
}
