#include "../wgrad/mma/kernel.cuh"

namespace convmixer_fast::cuda {
template cudaError_t depthwise_wgrad_mma<__nv_bfloat16>(const WgradParams&, const WgradMmaPlan&, const WgradShare&,
                                                        cudaStream_t);
}
