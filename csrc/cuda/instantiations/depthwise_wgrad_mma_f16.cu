#include "../wgrad/mma/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_wgrad_mma<__half>(const WgradParams&, const WgradPlan&, cudaStream_t);
}
