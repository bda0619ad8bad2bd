#include "../wgrad/direct/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_wgrad_direct<float>(const WgradParams&, const WgradDirectPlan&, const WgradShare&,
                                                   cudaStream_t);
}
