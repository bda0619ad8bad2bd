// The current device's properties. No torch.
//
// Terms: docs/glossary.md.
#pragma once
#include <cuda_runtime_api.h>

#include "answer_cache.h"
#include "device.h"

namespace convmixer_fast::cuda {

constexpr size_t kCachedDevices = 16;  // as many as the largest machines have; more are asked again and again

// static: the cache belongs to this library. The linker would merge that of an inline function with that of another
// copy of this library in the process.
static cudaError_t query_current_device(Device& device) {
  static AnswerCache<int, Device, kCachedDevices> answers;
  int number = 0;
  if (const cudaError_t status = cudaGetDevice(&number); status != cudaSuccess) return status;
  return answers.get(number, device, [&](Device& asked) {
    cudaError_t status = cudaSuccess;
    const auto query = [&](int& value, cudaDeviceAttr attribute) {
      if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, number);
    };
    query(asked.major, cudaDevAttrComputeCapabilityMajor);
    query(asked.sms, cudaDevAttrMultiProcessorCount);
    query(asked.cta_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    query(asked.sm_smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    return status;
  });
}

}  // namespace convmixer_fast::cuda
