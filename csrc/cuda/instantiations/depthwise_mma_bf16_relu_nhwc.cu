#include "../depthwise/mma/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_mma<__nv_bfloat16, Activation::kRelu, true>(const DepthwiseParams&, const MmaPlan&, int,
                                                                           cudaStream_t);
}
