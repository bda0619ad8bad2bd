// Every launcher of a CUDA kernel, declared once. No torch: the emulator in the tests builds these files as they are.
//
// Terms: docs/glossary.md.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "../../params.h"

namespace convmixer_fast::cuda {

// The fastest kernel that takes these params: the tensor-core or the direct kernel, as select.h says.
cudaError_t depthwise(const DepthwiseParams& params, cudaStream_t stream);

// Any kernel size, map, strides and dtype, on CUDA cores.
cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream);

// Bytes of device memory, not initialised, that depthwise_wgrad needs as its workspace; 0 if it needs none.
cudaError_t depthwise_wgrad_workspace(const WgradParams& params, size_t* bytes);

cudaError_t depthwise_wgrad(const WgradParams& params, cudaStream_t stream);

cudaError_t activate_pool(const PoolParams& params, cudaStream_t stream);

// Every launcher returns its status through this function, which clears the runtime's last error if the status is one.
// The runtime is linked statically into this library, so nobody else would clear that error, and the next launch would
// report it as its own.
inline cudaError_t without_last_error(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace convmixer_fast::cuda
