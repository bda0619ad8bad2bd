// What the choice of a kernel and of its grid depends on.
//
// Terms: docs/glossary.md.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

namespace convmixer_fast::cuda {

struct Device {
  int major;     // compute capability: 9 for sm_90
  int sms;       // streaming multiprocessors
  int cta_smem;  // bytes of dynamic shared memory that a CTA may have
  int sm_smem;   // bytes of shared memory that an SM has
};

#ifdef __CUDACC__
// The current device.
inline cudaError_t query_device(Device& device) {
  int number = 0;
  cudaError_t status = cudaGetDevice(&number);
  const auto query = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, number);
  };
  query(device.major, cudaDevAttrComputeCapabilityMajor);
  query(device.sms, cudaDevAttrMultiProcessorCount);
  query(device.cta_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  query(device.sm_smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return status;
}
#endif

}  // namespace convmixer_fast::cuda
