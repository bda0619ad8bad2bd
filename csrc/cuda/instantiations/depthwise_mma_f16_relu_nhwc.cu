#include "../depthwise/mma/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_mma<__half, Activation::kRelu, true>(const DepthwiseParams&, const MmaPlan&, int,
                                                                    cudaStream_t);
}
