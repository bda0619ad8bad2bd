// Every launcher of a CUDA kernel, declared once. No torch: the emulator in the tests builds these files as they are.
#pragma once
#include <cuda_runtime_api.h>

#include "../params.h"

namespace convmixer_fast::cuda {

// The fastest kernel that takes these params: tensor cores where depthwise_tiles.h says so, else the direct kernel.
cudaError_t depthwise(const DepthwiseParams& params, cudaStream_t stream);

// Any kernel size, map, strides and dtype, on CUDA cores.
cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream);

cudaError_t activate_pool(const PoolParams& params, cudaStream_t stream);

}  // namespace convmixer_fast::cuda
